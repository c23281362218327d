"""What landmarks of a face and the pixels around it prove: prompts for real photos, and whether images follow them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from lit_multiip.backbone.dlib_faces import DlibDetector, five_of
from lit_multiip.backbone.faces import FaceDetector, Landmarks
from lit_multiip.backbone.onnx import Pixels
from lit_multiip.files import LitMultiIPError

INF = float("inf")
Measures = Mapping[str, float]  # by attribute; NaN or absent where it cannot be measured
Classes = dict[str, str]  # by attribute, the class that was read


@dataclass(frozen=True)
class Attribute:
    """One thing that a prompt may say of a photo.

    Attributes:
        proven: by class, the least and the largest value that proves it, in ascending order. Between two classes
            nothing is said of a photo, so that a small change of it does not make its prompt wrong.
        words: what prompts say, by class; a class without words is read and never said.
    """

    proven: Mapping[str, tuple[float, float]]
    words: Mapping[str, str]

    def prove(self, value: float) -> str | None:
        """Return the class that a value proves, or None."""
        return next((name for name, (low, high) in self.proven.items() if low <= value <= high), None)

    def read(self, value: float) -> str | None:
        """Return the nearest class, None for NaN; the border lies in the middle between two classes."""
        if np.isnan(value):
            return None
        bounds = list(self.proven.values())
        borders = [(below[1] + above[0]) / 2 for below, above in pairwise(bounds)]
        return list(self.proven)[sum(value > border for border in borders)]


# The one table. Left and right are the viewer's. The order is that of a prompt's words.
ATTRIBUTES: dict[str, Attribute] = {
    "expression": Attribute(  # width of the mouth by the distance of the outer corners of the eyes
        {"serious": (-INF, 0.57), "smiling": (0.72, INF)}, {"serious": "with a serious look", "smiling": "smiling"}
    ),
    "mouth": Attribute(  # gap between the lips by the width of the mouth
        {"closed": (-INF, 0.04), "open": (0.12, INF)}, {"closed": "with a closed mouth", "open": "with an open mouth"}
    ),
    "turn": Attribute(  # the nose's way from the middle of the eyes, along their line, by their distance
        {"left": (-INF, -0.17), "front": (-0.08, 0.08), "right": (0.17, INF)},
        {"left": "looking to the left", "front": "facing the camera", "right": "looking to the right"},
    ),
    "tilt": Attribute(  # degrees of the eyes' line
        {"left": (-INF, -7), "upright": (-3, 3), "right": (7, INF)},
        {"left": "with the head tilted to the left", "right": "with the head tilted to the right"},
    ),
    "background": Attribute(  # grey level of the upper corners
        {"dark": (-INF, 70), "bright": (140, INF)},
        {"dark": "in front of a dark background", "bright": "in front of a bright background"},
    ),
    "colours": Attribute(  # mean of the largest less the smallest channel, of 1
        {"none": (-INF, 0.02), "some": (0.08, INF)}, {"none": "in black and white"}
    ),
}
CORNERS_DIFFER = 60  # grey levels from which the two upper corners are no one background


def measure(pixels: Pixels, points: Landmarks) -> dict[str, float]:
    """Return the value of every attribute that so many landmarks give.

    Args:
        pixels: RGB, (H, W, 3).
        points: five landmarks (5, 2) or dlib's (68, 2), x and y in px; `expression` and `mouth` need all 68.
    """
    five = five_of(points).astype(np.float64)
    line = five[1] - five[0]
    distance = max(float(np.linalg.norm(line)), 1e-6)
    nose = five[2] - (five[0] + five[1]) / 2
    values = {
        "turn": float(nose @ line) / distance**2,
        "tilt": float(np.degrees(np.arctan2(line[1], line[0]))),
        "background": _background(pixels),
        "colours": float((pixels.max(axis=2).astype(np.float64) - pixels.min(axis=2)).mean() / 255),
    }
    if len(points) == 68:

        def apart(a: int, b: int) -> float:
            return max(float(np.linalg.norm(points[a] - points[b])), 1e-6)

        values |= {"expression": apart(48, 54) / apart(36, 45), "mouth": apart(62, 66) / apart(48, 54)}
    return values


def _background(pixels: Pixels) -> float:
    """Return the grey level of the upper corners, 15 % of the height and 20 % of the width each; NaN if they differ."""
    height, width = (max(1, round(share * size)) for share, size in zip((0.15, 0.2), pixels.shape, strict=False))
    grey = pixels[:height].astype(np.float64) @ (0.299, 0.587, 0.114)  # (h, W)
    left, right = float(np.median(grey[:, :width])), float(np.median(grey[:, -width:]))
    return (left + right) / 2 if abs(left - right) < CORNERS_DIFFER else float("nan")


class FaceReader:
    """Says in words what landmarks prove of a photo, and reads the same back from an image.

    Args:
        detector: gives the landmarks: dlib's 68 by default, or YuNet's five, which say less.
        words: other words than those of `ATTRIBUTES`, by attribute and class; an empty text leaves a class unsaid.
    """

    def __init__(
        self, detector: FaceDetector | None = None, words: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        self.words = merge_words(words or {})
        self.detector = detector if detector is not None else DlibDetector()
        phrases = [(text, name, kind) for name, said in self.words.items() for kind, text in said.items()]
        self._phrases = sorted(phrases, key=lambda phrase: -len(phrase[0]))  # the longer goes first

    def measure(self, pixels: Pixels) -> dict[str, float] | None:
        """Return the values of an RGB image (H, W, 3) by attribute; None where no face is found."""
        points = self.detector.points(pixels)
        return None if points is None else measure(pixels, points)

    def __call__(self, images: Sequence[Image.Image]) -> list[str | None]:
        """Return what is proven of RGB images, such as "smiling, facing the camera"; None where no face is found."""
        measured = [self.measure(np.asarray(image)) for image in images]
        return [None if values is None else self.describe(values) for values in measured]

    def describe(self, values: Measures) -> str:
        """Return the words for what values prove; it is empty if they prove nothing."""
        proven = {name: one.prove(values[name]) for name, one in ATTRIBUTES.items() if name in values}
        said = [self.words[name].get(kind) for name, kind in proven.items() if kind is not None]
        return ", ".join(text for text in said if text)

    def named(self, prompt: str) -> Classes:
        """Return the classes that a prompt names; of two of one attribute, the one with the longer words."""
        rest, found = f" {' '.join(prompt.lower().split())} ", Classes()
        for text, name, kind in self._phrases:
            rest, count = re.subn(rf"(?<!\w){re.escape(text)}(?!\w)", "|", rest)
            if count:
                found.setdefault(name, kind)
        return found

    def agreement(self, values: Measures, prompt: str) -> float:
        """Return the share of what a prompt names that is read from values; NaN if they can tell of none of it."""
        named = {name: kind for name, kind in self.named(prompt).items() if not np.isnan(values.get(name, np.nan))}
        correct = [ATTRIBUTES[name].read(values[name]) == kind for name, kind in named.items()]
        return sum(correct) / len(correct) if correct else float("nan")


def merge_words(given: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return the words of all attributes by class, `given` in place of those of `ATTRIBUTES`."""
    words = {name: dict(one.words) for name, one in ATTRIBUTES.items()}
    for name, said in given.items():
        if name not in words or not isinstance(said, Mapping):
            raise LitMultiIPError(f"words of {name!r}: give classes and words of one of {', '.join(words)}")
        for kind, text in said.items():
            if kind not in ATTRIBUTES[name].proven or not isinstance(text, str):
                known = ", ".join(ATTRIBUTES[name].proven)
                raise LitMultiIPError(f"words of {name}: {kind!r}: {text!r}: give a text for one of {known}")
            words[name][kind] = " ".join(text.lower().split())
    words = {name: {kind: text for kind, text in said.items() if text} for name, said in words.items()}
    flat = [text for said in words.values() for text in said.values()]
    if twice := [text for text in flat if flat.count(text) > 1]:
        raise LitMultiIPError(f"words say {twice[0]!r} of two things: give each its own")
    return words


def self_agreement(
    reader: FaceReader, images: Iterable[Image.Image], change: Callable[[Image.Image], Image.Image]
) -> dict[str, dict[str, Any]]:
    """Read images, change them (a JPEG, a VAE's round trip), and read them again.

    Returns:
        By attribute, `all` being their sum: `named`, how often the image proves a class that has words, and `agree`,
        the share of these in which the changed image is read alike. `faces` counts the `images` in which a face was
        found, and those `lost`, in which it was found before the change alone.
    """
    counts = {name: [0, 0] for name in ATTRIBUTES}
    faces = {"images": 0, "found": 0, "lost": 0}
    for image in images:
        faces["images"] += 1
        before = reader.measure(np.asarray(image))
        if before is None:
            continue
        faces["found"] += 1
        after = reader.measure(np.asarray(change(image)))
        faces["lost"] += after is None
        for name, kind in reader.named(reader.describe(before)).items() if after is not None else ():
            counts[name][0] += 1
            counts[name][1] += after is not None and ATTRIBUTES[name].read(after[name]) == kind
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    shares = {name: {"named": n, "agree": right / n if n else float("nan")} for name, (n, right) in counts.items()}
    return {**shares, "faces": faces}
