"""Networks of images in ONNX files, by onnxruntime on the CPU: the same image gives the same numbers in every run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lit_multiip.files import LitMultiIPError, first_line, hash_file

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OnnxNetwork:
    """A network of square images alone, (B, 3, S, S) -> outputs (B, ...).

    Args:
        path: the ONNX file, or `org/repository/file.onnx` on the Hugging Face hub.
        side: px of the square; None reads it from the file, where it is fixed there.
        outputs: names of the outputs that are wanted; None wants the first.
    """

    def __init__(self, path: str, side: int | None = None, outputs: Sequence[str] | None = None) -> None:
        runtime = import_faces("onnxruntime")
        file = weights_file(path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # it warns of initialisers that could be removed
        try:
            self._session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # each of its faults has a class of its own, below Exception alone
            raise LitMultiIPError(
                f"'{file}' is no ONNX network that onnxruntime reads ({first_line(error)})"
            ) from error
        given, *more = self._session.get_inputs()
        shape = list(given.shape)  # names in place of sizes that are not fixed
        fixed = shape[2] if len(shape) == 4 and isinstance(shape[2], int) and shape[2] == shape[3] else None
        if more or len(shape) != 4 or (shape[1] not in (3, None) and not isinstance(shape[1], str)):
            inputs = f"{shape} and {len(more)} more inputs" if more else f"{shape}"
            raise LitMultiIPError(f"'{file}' takes {inputs}: give a network of images alone, (B, 3, S, S)")
        if side is None and fixed is None:
            raise LitMultiIPError(f"'{file}' takes {shape}, whose side is not fixed: set side, such as 112")
        if side is not None and (side < 1 or fixed not in (None, side)):
            raise LitMultiIPError(f"side is {side} and '{file}' takes {shape}: leave side out")
        self.side, self.file, self.sha256 = side or fixed or 0, file, hash_file(file)
        known: list[str] = [output.name for output in self._session.get_outputs()]
        self.outputs = known[:1] if outputs is None else list(outputs)
        if unknown := [name for name in self.outputs if name not in known]:
            raise LitMultiIPError(f"'{file}' has no output '{unknown[0]}': give one of {', '.join(known)}")
        self._input = given.name
        self._batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        # by a run, for files seldom say them
        self.widths = [rows.shape[1] for rows in self(np.zeros((1, 3, self.side, self.side), dtype=np.float32))]

    def __call__(self, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Return the outputs of images (B, 3, S, S) as `normalise` makes them, flattened, (B, width) each."""
        size, parts = self._batch or len(images), []
        for start in range(0, len(images), size):  # as many at a time as the network takes
            part = images[start : start + size]
            short = size - len(part)
            padded = np.concatenate([part, np.zeros((short, *part.shape[1:]), np.float32)]) if short else part
            given = {self._input: np.ascontiguousarray(padded, dtype=np.float32)}
            found = self._session.run(self.outputs, given)
            parts.append([np.asarray(rows, dtype=np.float32).reshape(size, -1)[: len(part)] for rows in found])
        return [np.concatenate(rows) for rows in zip(*parts, strict=True)]


def check_normalisation(std: Sequence[float], colours: str) -> None:
    """Refuse what `normalise` cannot carry out."""
    if colours not in ("rgb", "bgr"):
        raise LitMultiIPError(f"colours is {colours!r}: channels are in the order 'rgb' or 'bgr'")
    if min(std) <= 0:
        raise LitMultiIPError(f"std is {tuple(std)}: values are divided by it, so it must be above zero")


def normalise(
    pixels: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float], colours: str = "rgb"
) -> npt.NDArray[np.float32]:
    """Return RGB images (B, S, S, 3) as a network sees them, (x / 255 - mean) / std, (B, 3, S, S).

    Args:
        pixels: of the images.
        mean: of each channel, in the order of `colours`.
        std: of each channel.
        colours: order of the channels that the network expects, `rgb` or `bgr`.
    """
    values = pixels[..., :: 1 if colours == "rgb" else -1].astype(np.float32) / 255
    scaled = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.asarray(scaled, np.float32).transpose(0, 3, 1, 2)


def resized(pixels: Pixels, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Pixels:
    """Scale an image, or a box of it (left, top, right, bottom in px), to a size (width, height)."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box=box))


def weights_file(given: str) -> Path:
    """Return the path of a file of weights, given as such or as `org/repository/file` on the Hugging Face hub.

    Raises:
        FileNotFoundError: it is not there, and the hub does not give it.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if path.is_absolute() or path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+/[\w./-]+", given) or given[0] == ".":
        raise FileNotFoundError(f"no file '{given}': give a file of weights, or org/repository/file.onnx on the hub")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, file = "/".join(given.split("/")[:2]), "/".join(given.split("/")[2:])
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"'{given}' is no file here, and the hub does not give {file} of {repository} ({first_line(error)}): fetch "
            f"https://huggingface.co/{repository}/resolve/main/{file} where there is a network, and give its path"
        ) from error


def import_faces(module: str) -> Any:
    """Import dlib, onnxruntime or OpenCV, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"cv2": "OpenCV", "dlib": "dlib (dlib-bin)"}.get(module, module)
        raise LitMultiIPError(
            f"this needs {package}, which is not installed: pip install 'lit_multiip[faces]'"
        ) from error
