from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lit_multiip.data import mini_faces
from lit_multiip.data.mini_faces import TRAITS, Person, draw, person, photo, prompt, scene, trait_phrases

CLEAN = scene(0, 5, 0, clean=True)
LONG = mini_faces.HAIR_STYLES.index("long")
# Long hair, so that its colour shows, and no beard, which has the hair's colour too.
HAIRY = {**person(0, 5).values, "hair_style": LONG, "hair_colour": 0, "facial_hair": 0}


def extremes(trait: str) -> tuple[Person, Person]:
    spec = TRAITS[trait]
    low, high = (0.0, 1.0) if spec.continuous else (0, len(spec.names) - 1)
    return Person({**HAIRY, trait: low}), Person({**HAIRY, trait: high})


def changed(trait: str, shot: mini_faces.Scene) -> np.ndarray:
    a, b = (draw(who, shot).astype(int) for who in extremes(trait))
    return np.abs(a - b).max(axis=-1)


def test_any_photo_is_a_function_of_seed_person_and_number():
    assert np.array_equal(photo(3, 17, 4), photo(3, 17, 4))
    for other in (photo(4, 17, 4), photo(3, 18, 4), photo(3, 17, 5)):
        assert np.abs(photo(3, 17, 4).astype(int) - other).max() > 30


def test_roles_are_disjoint():
    ranges = sorted((r.start, r.stop) for r in mini_faces.ROLES.values())
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_spans_at_least_three_pixels(trait):
    rows, columns = np.nonzero(changed(trait, CLEAN) > 6)
    assert np.ptp(rows) + 1 >= 3 or np.ptp(columns) + 1 >= 3
    assert len(rows) >= 6


@pytest.mark.parametrize("trait", [name for name, spec in TRAITS.items() if spec.hidden_by])
def test_an_occluder_hides_its_traits_completely(trait):
    for seed in range(20):
        shot = replace(scene(seed, 5, 1, clean=True), **{TRAITS[trait].hidden_by: True})
        assert changed(trait, shot).max() == 0, f"seed {seed}"


def test_an_expression_cannot_be_seen_under_a_scarf():
    shot = replace(CLEAN, scarf=True)
    images = [draw(person(0, 5), replace(shot, expression=k)) for k in range(3)]
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    assert shot.label("expression") is None


def test_most_photos_hide_two_of_three_regions():
    shots = [scene(0, p, n) for p in range(100) for n in range(10)]
    hidden = np.array([s.sunglasses + s.hat + s.scarf for s in shots])
    assert 0.81 < (hidden == 2).mean() < 0.89
    for occluder in mini_faces.OCCLUDERS:  # each region is hidden equally often
        assert 0.56 < np.mean([getattr(s, occluder) for s in shots]) < 0.66


def test_a_prompt_names_the_scene_and_no_trait():
    names = {phrase for p in range(200) for phrase in trait_phrases(person(0, p), CLEAN)}
    for p in range(200):
        text = prompt(scene(0, p, 0))
        assert text.startswith("a photo of a ") and "wall" in text
        assert not any(name in text for name in names)


def test_captions_name_only_what_is_visible():
    shot = replace(CLEAN, hat=True, sunglasses=True, scarf=True)
    phrases = trait_phrases(person(0, 5), shot)
    assert len(phrases) == sum(spec.hidden_by is None for spec in TRAITS.values())
    assert len(trait_phrases(person(0, 5), CLEAN)) == len(TRAITS) - 1  # hair colour and style share a phrase
