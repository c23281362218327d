"""Drawn portraits whose identity is known exactly: the offline stand-in for a face data set.

A *person* is a fixed set of traits; a *photo* adds a scene (pose, light, expression, background, shirt) and occluders.
Sunglasses hide the eyes and brows, a hat the hair, a scarf everything from the mouth down, and most photos wear two of
the three, so that one photo shows only part of who a person is while several photos together show all of it.

Every trait and scene is a pure function of ``(seed, person)`` and ``(seed, person, photo)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SIDE = 64  # px

FloatArray = npt.NDArray[Any]
Paint = Callable[[FloatArray, object], None]

# Disjoint person indices by purpose, so that nothing that was trained ever saw a person it is later scored on.
ROLES: dict[str, range] = {
    "backbone": range(0, 1_000_000),
    "adapter": range(1_000_000, 2_000_000),
    "critic": range(2_000_000, 3_000_000),
    "critic_b": range(3_000_000, 4_000_000),
    "train": range(4_000_000, 5_000_000),
    "validation": range(5_000_000, 6_000_000),
    "test": range(6_000_000, 7_000_000),
}
_starts = sorted((people.start, people.stop) for people in ROLES.values())
assert all(stop <= start for (_, stop), (start, _) in pairwise(_starts)), "roles overlap"

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (196, 52, 48),
    "green": (58, 148, 70),
    "blue": (56, 92, 190),
    "yellow": (226, 196, 66),
    "purple": (132, 66, 160),
    "white": (228, 228, 224),
}
COLOUR_NAMES = list(COLOURS)
HAIR_COLOURS: dict[str, tuple[int, int, int]] = {
    "blond": (206, 168, 100),
    "ginger": (170, 96, 52),
    "brown": (112, 74, 50),
    "black": (44, 36, 34),
    "grey": (152, 148, 142),
}
EYE_COLOURS: dict[str, tuple[int, int, int]] = {
    "brown": (96, 56, 26),
    "blue": (54, 110, 200),
    "green": (52, 140, 76),
    "black": (18, 16, 18),
}
LIGHT_SKIN, DARK_SKIN = np.array([228, 182, 150], np.float32), np.array([178, 124, 92], np.float32)

HAIR_STYLES = ["bald", "short", "parted", "long", "afro", "bun", "mohawk"]
FACIAL_HAIR = ["no beard", "moustache", "goatee", "full beard"]
MARKS = ["no marks", "freckles", "mole"]
EXPRESSIONS = ["serious", "smiling", "surprised"]
OCCLUDERS = ["sunglasses", "hat", "scarf"]


class Trait(NamedTuple):
    """How one trait is named in captions and classified by the critics.

    ``names`` are the classes. A continuous trait in [0, 1] is cut into ``len(names)`` equal bins.
    ``hidden_by`` is the occluder under which it cannot be seen, if any.
    """

    names: list[str]
    hidden_by: str | None
    continuous: bool


TRAITS: dict[str, Trait] = {
    "skin": Trait(["light skin", "tan skin", "brown skin"], None, True),
    "face_width": Trait(["narrow face", "wide face"], None, True),
    "nose_width": Trait(["slim nose", "broad nose"], None, True),
    "nose_length": Trait(["short nose", "long nose"], None, True),
    "hair_style": Trait(HAIR_STYLES, "hat", False),
    "hair_colour": Trait(list(HAIR_COLOURS), "hat", False),
    "eye_colour": Trait(list(EYE_COLOURS), "sunglasses", False),
    "eye_size": Trait(["small eyes", "large eyes"], "sunglasses", True),
    "eye_spacing": Trait(["close eyes", "distant eyes"], "sunglasses", True),
    "brow_thickness": Trait(["thin brows", "thick brows"], "sunglasses", True),
    "brow_tilt": Trait(["raised brows", "frowning brows"], "sunglasses", True),
    "jaw": Trait(["round jaw", "square jaw"], "scarf", True),
    "mouth_width": Trait(["narrow mouth", "wide mouth"], "scarf", True),
    "lips": Trait(["thin lips", "full lips"], "scarf", True),
    "facial_hair": Trait(FACIAL_HAIR, "scarf", False),
    "marks": Trait(MARKS, "scarf", False),
}

SCENE_ATTRIBUTES: dict[str, list[str]] = {
    "background": COLOUR_NAMES,
    "shirt": COLOUR_NAMES,
    "expression": EXPRESSIONS,
    **{name: ["absent", "present"] for name in OCCLUDERS},
}


@dataclass(frozen=True)
class Person:
    """The traits of one drawn person: continuous ones in [0, 1], discrete ones as class indices."""

    values: dict[str, float]

    def label(self, trait: str) -> int:
        """Return the class index of ``trait`` (the bin, where it is continuous)."""
        value, spec = self.values[trait], TRAITS[trait]
        return min(int(value * len(spec.names)), len(spec.names) - 1) if spec.continuous else int(value)


@dataclass(frozen=True)
class Scene:
    """What a photo adds to a person; indices refer to ``SCENE_ATTRIBUTES``, lengths are pixels at 64 px."""

    background: int
    shirt: int
    expression: int
    sunglasses: bool
    hat: bool
    scarf: bool
    hat_colour: int
    scarf_colour: int
    shift: tuple[float, float]
    tilt: float  # radians
    scale: float
    yaw: float  # px that the inner features move sideways
    light: tuple[float, float, float]  # gain per channel: exposure and colour cast
    side_light: float  # relative brightening from the left edge to the right edge

    def label(self, attribute: str) -> int | None:
        """Return the class index of a scene attribute, or None where the photo cannot show it."""
        if attribute == "expression" and self.scarf:
            return None
        return int(getattr(self, attribute))

    def shows(self, trait: str) -> bool:
        """Tell whether the photo shows ``trait`` of its person."""
        hidden_by = TRAITS[trait].hidden_by
        return hidden_by is None or not getattr(self, hidden_by)


def person(seed: int, index: int) -> Person:
    """Draw the traits of person ``index``."""
    rng = np.random.default_rng([1, seed, index])
    values: dict[str, float] = {}
    for name, spec in TRAITS.items():
        values[name] = float(rng.uniform()) if spec.continuous else int(rng.integers(len(spec.names)))
    return Person(values)


# Probability that a photo hides 0, 1, 2 of the three regions.
HIDDEN_REGIONS = (0.02, 0.13, 0.85)


def scene(seed: int, index: int, photo: int, clean: bool = False) -> Scene:
    """Draw the scene of one photo; ``clean`` leaves out every occluder (the probes of the gate)."""
    rng = np.random.default_rng([2, seed, index, photo])
    hidden = rng.permutation(3)[: rng.choice(3, p=HIDDEN_REGIONS)]
    exposure, cast = rng.uniform(0.80, 1.15), rng.uniform(0.90, 1.10, 3)
    return Scene(
        background=int(rng.integers(len(COLOUR_NAMES))),
        shirt=int(rng.integers(len(COLOUR_NAMES))),
        expression=int(rng.integers(len(EXPRESSIONS))),
        sunglasses=not clean and 0 in hidden,
        hat=not clean and 1 in hidden,
        scarf=not clean and 2 in hidden,
        hat_colour=int(rng.integers(len(COLOUR_NAMES))),
        scarf_colour=int(rng.integers(len(COLOUR_NAMES))),
        shift=(float(rng.uniform(-3, 3)), float(rng.uniform(-1.5, 1.5))),
        tilt=float(rng.uniform(-0.14, 0.14)),
        scale=float(rng.uniform(0.92, 1.04)),
        yaw=float(rng.uniform(-2.2, 2.2)),
        light=tuple(float(exposure * c) for c in cast),  # type: ignore[arg-type]
        side_light=float(rng.uniform(-0.18, 0.18)),
    )


def prompt(scene: Scene, traits: str = "") -> str:
    """Describe the scene, never the person: ``a photo of a smiling person wearing a hat, in a red shirt, ...``.

    ``traits`` is inserted after the class noun; only the miniature's own pre-training uses it.
    """
    expression = "" if scene.scarf else EXPRESSIONS[scene.expression] + " "
    worn = [name if name == "sunglasses" else f"a {name}" for name in OCCLUDERS if getattr(scene, name)]
    wearing = f" wearing {' and '.join(worn)}" if worn else ""
    return (
        f"a photo of a {expression}person{traits}{wearing}, "
        f"in a {COLOUR_NAMES[scene.shirt]} shirt, in front of a {COLOUR_NAMES[scene.background]} wall"
    )


def trait_phrases(who: Person, shown_in: Scene) -> list[str]:
    """Name every trait that the photo shows, for the miniature's CLIP and UNet pre-training captions."""
    phrases = []
    for name, spec in TRAITS.items():
        if name == "hair_colour" or not shown_in.shows(name):
            continue
        phrase = spec.names[who.label(name)]
        if name == "hair_style":
            colour = TRAITS["hair_colour"].names[who.label("hair_colour")]
            phrase = "bald head" if phrase == "bald" else f"{phrase} {colour} hair"
        elif name == "eye_colour":
            phrase = f"{phrase} eyes"
        phrases.append(phrase)
    return phrases


def _ellipse(u: FloatArray, v: FloatArray, a: float, b: float) -> FloatArray:
    """Anti-aliased coverage of an ellipse with half-axes ``a``, ``b`` px."""
    r = np.sqrt((u / a) ** 2 + (v / b) ** 2)
    return np.clip(0.5 - (r - 1) * min(a, b), 0, 1)


def _box(u: FloatArray, v: FloatArray, a: float, b: float, corner: float = 1.0) -> FloatArray:
    """Anti-aliased coverage of a rounded box with half-sides ``a``, ``b`` px."""
    qu, qv = np.abs(u) - a + corner, np.abs(v) - b + corner
    d = np.hypot(np.maximum(qu, 0), np.maximum(qv, 0)) + np.minimum(np.maximum(qu, qv), 0) - corner
    return np.clip(0.5 - d, 0, 1)


def _below(v: FloatArray) -> FloatArray:
    return np.clip(0.5 + v, 0, 1)


_ROWS, _COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


def draw(who: Person, shot: Scene) -> npt.NDArray[np.uint8]:
    """Draw one portrait.

    Returns:
        RGB, (64, 64, 3) uint8.
    """
    t = who.values
    wall = np.array(COLOURS[COLOUR_NAMES[shot.background]], np.float32) * 0.8
    image = wall * (1.12 - 0.24 * _ROWS / SIDE)[..., None]

    def paint(mask: FloatArray, colour: object) -> None:
        nonlocal image
        image = image + mask[..., None] * (np.asarray(colour, np.float32) - image)

    # Head coordinates: u to the right, v down, in px, origin between the eyes and the mouth.
    x, y = _COLUMNS - SIDE / 2 - shot.shift[0], _ROWS - 33 - shot.shift[1]
    cos, sin = np.cos(shot.tilt) / shot.scale, np.sin(shot.tilt) / shot.scale
    u, v = cos * x + sin * y, cos * y - sin * x
    f = u - shot.yaw  # inner features turn with the head

    skin = LIGHT_SKIN + (DARK_SKIN - LIGHT_SKIN) * t["skin"]
    hair = np.array(HAIR_COLOURS[list(HAIR_COLOURS)[int(t["hair_colour"])]], np.float32)
    style = "bald" if shot.hat else HAIR_STYLES[int(t["hair_style"])]
    half_width, half_height = 15.6 + 1.8 * t["face_width"], 20.5
    shirt = np.array(COLOURS[COLOUR_NAMES[shot.shirt]], np.float32)

    # Behind the head.
    if style == "long":
        paint(_box(u, v - 3, half_width + 4.5, 25, 12), hair * 0.85)
    elif style == "afro":
        paint(_ellipse(u, v + 9, half_width + 7.5, 19), hair)
    elif style == "bun":
        paint(_ellipse(u, v + 24, 6.5, 6), hair * 0.9)
    elif style == "mohawk":
        paint(_box(u, v + 19, 4.0, 11, 3), hair)
    paint(_box(u, v - 22, 7.5, 9, 3), skin * 0.82)  # neck
    paint(_ellipse(x, y - 39, 27, 17), shirt)

    # Face: a super-ellipse whose lower half squares up with the jaw.
    power = np.where(v > 0, 2.0 + 2.2 * t["jaw"], 2.2)
    radius = (np.abs(u / half_width) ** power + np.abs(v / half_height) ** power) ** (1 / power)
    face = np.clip(0.5 - (radius - 1) * half_width, 0, 1).astype(np.float32)
    for side in (-1, 1):
        paint(_ellipse(u - side * half_width, v + 1, 2.6, 4.0), skin * 0.9)
    paint(face, skin)

    if not shot.scarf:
        _paint_mouth(paint, t, shot, skin, hair, face, u, v, f, half_width)

    # Nose: always visible.
    nose_height, nose_width = 2.8 + 1.0 * t["nose_length"], 1.9 + 1.1 * t["nose_width"]
    paint(_ellipse(f, v - 5.6 + nose_height, 1.3, nose_height + 1.0), skin * 0.88)
    paint(_ellipse(f, v - 5.2, nose_width, 1.6), skin * 0.74)

    # Eyes and brows.
    eye_half, spacing = 2.7 + 1.3 * t["eye_size"], 6.0 + 2.0 * t["eye_spacing"]
    iris = EYE_COLOURS[list(EYE_COLOURS)[int(t["eye_colour"])]]
    for side in () if shot.sunglasses else (-1, 1):
        e = f - side * spacing
        paint(_ellipse(e, v + 2.5, eye_half, eye_half * 0.74), (246, 246, 244))
        paint(_ellipse(e, v + 2.5, 2.0, 2.0), iris)
        tilt = 0.36 * (t["brow_tilt"] - 0.5)
        paint(_box(e, v + 8.2 - tilt * side * e, 4.2, 0.8 + 1.0 * t["brow_thickness"], 0.7), (58, 44, 38))

    # Hair over the forehead.
    cap = np.clip(0.5 - (radius - 1.07) * half_width, 0, 1).astype(np.float32)
    if style in ("short", "bun"):
        paint(cap * _below(-v - 13.5), hair)
    elif style == "parted":
        paint(cap * _below(-v - 9.5 - 0.55 * (f + 5)) * _below(-v - 8), hair)
    elif style == "long":
        paint(cap * _below(-v - 13.0), hair)
        for side in (-1, 1):
            paint(_box(u - side * (half_width + 0.5), v - 4, 3.2, 20, 2), hair)
    elif style == "afro":
        paint(cap * _below(-v - 12.0), hair)
    elif style == "mohawk":
        paint(_box(u, v + 19, 3.4, 6.5, 2), hair)

    # Occluders: each hides its region completely.
    if shot.sunglasses:
        for side in (-1, 1):
            paint(_box(f - side * 7.2, v + 4.6, 7.0, 6.6, 3), (26, 26, 30))
        paint(_box(f, v + 5.5, half_width, 1.3), (26, 26, 30))
    if shot.hat:
        felt = np.array(COLOURS[COLOUR_NAMES[shot.hat_colour]], np.float32) * 0.78
        paint(_ellipse(u, v + 14.5, half_width + 1.5, 12.5) * _below(-v - 12), felt)
        paint(_box(u, v + 13.0, half_width + 4, 2.0, 1.5), felt * 0.7)
    if shot.scarf:
        wool = np.array(COLOURS[COLOUR_NAMES[shot.scarf_colour]], np.float32) * 0.9
        paint(_box(u, v - 15.6, half_width + 2.5, 8.6, 4), wool)
        paint(_box(u, v - 15.0, half_width + 2.5, 0.9), wool * 0.72)
        paint(_box(u, v - 20.0, half_width + 2.5, 0.9), wool * 0.72)

    shade = 1 + shot.side_light * (_COLUMNS / SIDE - 0.5) * 2
    image = image * shade[..., None] * np.array(shot.light, np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _paint_mouth(
    paint: Paint,
    t: dict[str, float],
    shot: Scene,
    skin: FloatArray,
    hair: FloatArray,
    face: FloatArray,
    u: FloatArray,
    v: FloatArray,
    f: FloatArray,
    half_width: float,
) -> None:
    """Paint what a scarf hides: marks, facial hair, mouth."""
    mark = MARKS[int(t["marks"])]
    if mark == "freckles":
        for du, dv in ((-9.5, 8.0), (-7.0, 10.8), (-11, 11.2), (9.5, 8.0), (7.0, 10.8), (11, 11.2)):
            paint(_ellipse(f - du, v - dv, 1.3, 1.2), skin * 0.62)
    elif mark == "mole":
        paint(_ellipse(f - 9, v - 10, 2.0, 2.0), skin * 0.32)
    beard, mouth_v = FACIAL_HAIR[int(t["facial_hair"])], v - 12.0
    if beard == "full beard":
        paint(face * _below(v - 8.5 - 0.012 * (half_width - np.abs(u)) ** 2), hair)
        paint(_box(f, v - 9.0, 7.5, 1.6), hair)
    elif beard == "goatee":
        paint(_box(f, v - 17.0, 4.2, 3.6, 2), hair)
    elif beard == "moustache":
        paint(_box(f, v - 8.6, 6.5, 1.7), hair)
    width, lips = 4.2 + 2.8 * t["mouth_width"], 1.1 + 1.1 * t["lips"]
    lip_colour = skin * np.array([0.78, 0.45, 0.45], np.float32)
    expression = EXPRESSIONS[shot.expression]
    if expression == "surprised":
        paint(_ellipse(f, mouth_v - 0.6, 0.62 * width + 0.4 * lips, 2.6 + 0.8 * lips), lip_colour)
        paint(_ellipse(f, mouth_v - 0.6, 0.62 * width - 0.8, 1.9), (60, 20, 24))
    else:
        bend = 0.10 if expression == "smiling" else 0.0
        curve = mouth_v - 0.6 + bend * (f**2 - 12)
        if expression == "smiling":
            paint(_box(f, curve, width + 0.8, lips + 0.9), lip_colour)
            paint(_box(f, curve + 0.2, width - 0.6, 0.9, 0.5), (240, 236, 230))
        else:
            paint(_box(f, curve, width, lips), lip_colour)


def photo(seed: int, index: int, number: int, clean: bool = False) -> npt.NDArray[np.uint8]:
    """Draw photo ``number`` of person ``index``: RGB, (64, 64, 3) uint8."""
    return draw(person(seed, index), scene(seed, index, number, clean))
