"""The command `page`: a web page that draws one person from photos, tunes on them, and hands out the files."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from lit_multiip.backbone.pipeline import Backbone
from lit_multiip.backbone.sampler import Sampling
from lit_multiip.evaluation import faces, vision  # noqa: F401  so that a config may call their extractors by name
from lit_multiip.evaluation.critic import Resemblance
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.methods.method import Dtype
from lit_multiip.personalizer import Personalizer
from lit_multiip.pretrained import read_extractors
from lit_multiip.tools.page_session import PageError, Studio

ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "GRADIO_RUN_HISTORY": "False"}


def page(
    run: str | None = None,
    backbone: str | None = None,
    method: str | None = None,
    score: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Serve a page that draws one person from photos, says how like they are, tunes, and hands out the files.

    Nothing leaves this machine. Photos, pictures and tuned weights are deleted ten minutes after a visitor closes the
    page, and when this command ends.

    Args:
        run: folder of a run, exported folder, or its hub id; null takes an untrained method.
        backbone: of an untrained method: `mini`, a file of configs/on/, a diffusers folder, or a hub id. Also that of
            an exported folder whose record does not name it. null is `mini`.
        method: the untrained one: an aggregator, such as `MaxPool`, or `DreamBooth`; null is `AvgPool`.
        score: file of configs/score/ with the networks that compare faces; null takes the run's, or the critic of the
            miniature.
        device: such as `cuda:1`; null takes a GPU where there is one.
        dtype: of the frozen weights; what is not `float32` cannot be exported.
        host: address that the page is served at; 0.0.0.0 lets all machines of the network in.
        port: of the page.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that photos are deleted then too
    with workspace() as folder, suppress(KeyboardInterrupt):
        studio = open_studio(folder, run, backbone, method, score, dtype)
        studio.base.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with serve(studio, host, port) as url:
            print(f"the page is at {url} ; Ctrl+C ends it, and deletes all photos", flush=True)
            threading.Event().wait()


@contextmanager
def workspace() -> Iterator[Path]:
    """Make a folder for all files of the page, uploads too, and delete it afterwards."""
    with tempfile.TemporaryDirectory(prefix="lit_multiip-page-") as root:
        folder = Path(root).resolve()
        settings = ENVIRONMENT | {"GRADIO_TEMP_DIR": str(folder)}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield folder
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def serve(studio: Studio, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serve the page from threads, within `workspace`; yield its address."""
    if not 1 <= port <= 65535:
        raise PageError(f"port={port}: give 1 to 65535")
    try:
        from lit_multiip.tools.page_layout import Page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise PageError('the page needs gradio: pip install -e ".[page]"') from error
    served = Page(studio)
    try:
        yield served.launch(host, port)
    finally:
        served.close()


# ---- what draws -------------------------------------------------------------------------------------------------


def open_studio(
    folder: Path,
    run: str | None = None,
    backbone: str | None = None,
    method: str | None = None,
    score: str | None = None,
    dtype: Dtype | None = None,
) -> Studio:
    """Load what all visitors share; see `page`."""
    own = None if run is None else Path(run).expanduser() / "config.yaml"
    own = own if own is not None and own.is_file() else None
    if run is not None and method is not None:
        raise PageError(f"'{run}' brings its own method: leave --method {method} out")
    if own is not None and backbone is not None:
        raise PageError(f"'{run}' brings its own backbone: leave --backbone {backbone} out")
    config: Mapping[str, Any] = {} if score is None and own is None else _read_config(Path(score or str(own)))
    extractors = read_extractors(config)
    if score is not None and not extractors:
        raise PageError(f"'{score}' names no networks that score: give a file of configs/score/, such as real.yaml")
    features = folder / "features"
    options: dict[str, Any] = {"extractors": extractors, "cache_dir": features, "dtype": dtype}
    if run is not None:
        options["backbone"] = None if backbone is None else read_backbone(backbone)[0]
        base = Personalizer.from_pretrained(run, **options)
    else:
        drawn_on, sampling = read_backbone(backbone or "mini")
        base = Personalizer.from_pretrained(drawn_on, method or "AvgPool", **options, **sampling)
    return Studio(base, folder, features, _find_checker(base, config))


def read_backbone(given: str) -> tuple[Backbone, dict[str, Any]]:
    """Make a backbone of its name, or of a file of configs/on/, which also says how it draws."""
    if not given.endswith((".yaml", ".yml")):
        return Backbone(given), {}
    config = _read_config(Path(given))
    if "backbone" not in config:
        raise PageError(f"'{given}' has no key `backbone`: give a file of configs/on/")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    made: Backbone = parser.instantiate_classes(parser.parse_object({"backbone": config["backbone"]})).backbone
    sampling = ((config.get("model") or {}).get("init_args") or {}).get("sampling")
    return made, {} if sampling is None else {"sampling": Sampling(**sampling)}


def _find_checker(base: Personalizer, config: Mapping[str, Any]) -> Extractor | None:
    """Return a network that tells whether two photos show one person, apart from those that score."""
    if base.model.backbone.path == "mini":
        return Resemblance()
    found = read_extractors(config) or []
    return next((one for one in found if one.can_identify and one.same_person is not None), None)


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PageError(f"'{file}' cannot be read ({' '.join(str(error).split())[:200]}): give a YAML file") from error
    if not isinstance(config, dict):
        raise PageError(f"'{file}' holds no keys: give a config")
    return config
