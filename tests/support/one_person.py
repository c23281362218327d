"""A folder with drawn photos of one person, and a config that tunes on them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lit_multiip.data import MiniFaces


def write_person(folder: Path, photos: int, number: int = 0) -> Path:
    """Write photos of the test person of that number, with their prompts beside them."""
    people = MiniFaces(train=1, validation=1, test=number + 1, photos=photos).people()
    person = [person for person in people if person.split == "test"][number]
    folder.mkdir(parents=True)
    for photo in person.photos:
        photo.image().save(folder / photo.name)
        (folder / photo.name).with_suffix(".txt").write_text(photo.prompt)
    return folder


def write_config(path: Path, backbone: Path, cache: Path) -> Path:
    """A config of two denoising steps on a backbone, scored by thumbnails."""
    config: dict[str, Any] = {
        "backbone": {"path": str(backbone)},
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "max_steps": 6,
            "val_check_interval": 2,
        },
        "model": {"init_args": {"sampling": {"steps": 2}}},
        "data": {"cache_dir": str(cache)},
        "score": {"extractors": [{"class_path": "scoring.Thumbnail"}], "anchors": False, "groups": 2, "resamples": 2},
    }
    path.write_text(yaml.safe_dump(config))
    return path


# what makes the config one of DreamBooth
DREAMBOOTH = (
    "--trainer.max_steps=-1", "--model.steps=6", "--model.class_images=2", "--trainer.val_check_interval=2",
)  # fmt: skip
