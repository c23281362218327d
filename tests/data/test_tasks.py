from collections import Counter
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import PurePath

import pytest
from PIL import Image

from lit_multiip.data.people import Person
from lit_multiip.data.photos import DataError, Photo
from lit_multiip.data.tasks import add_intruders, image_files, make_tasks, protocol


@dataclass(frozen=True)
class Stub(Photo):
    """A photo whose content is a word."""

    content: str = ""

    def image(self):
        return Image.new("RGB", (32, 32))

    def content_key(self):
        return sha256(self.content.encode()).hexdigest()


def person(name, contents):
    """One photo for each letter of `contents`; equal letters are copies."""
    photos = (
        Stub(name, f"{name}_{i:04d}.jpg", f"a photo of a person, {i}", f"{name}/{c}") for i, c in enumerate(contents)
    )
    return Person(name, tuple(photos))


def keys(photos):
    return {photo.content_key() for photo in photos}


@pytest.mark.parametrize(
    ("photos", "n_held_out", "n_distinct_references"),
    [(2, 1, 1), (9, 1, 8), (10, 1, 9), (11, 2, 9), (13, 4, 9), (20, 4, 9)],
)
def test_references_and_held_out_photos_number_as_documented(photos, n_held_out, n_distinct_references):
    tasks = make_tasks([person("Ann", "abcdefghijklmnopqrst"[:photos])])
    assert len(tasks) == n_held_out
    assert {len(task.references) for task in tasks} == {9}
    assert len(keys(tasks[0].references)) == n_distinct_references


def test_a_person_has_one_reference_set_and_no_held_out_photo_in_it():
    people = [person(f"p{i}", "abcdefghijklmn") for i in range(30)]
    tasks = make_tasks(people, seeds=2)
    assert len(tasks) == 30 * 4 * 2
    for who in people:
        own = [task for task in tasks if task.person == who.name]
        assert len({task.references for task in own}) == 1
        assert not keys(own[0].references) & {task.held_out.content_key() for task in own}
        assert all(task.prompt == task.held_out.prompt for task in own)


def test_a_copy_of_a_held_out_photo_is_never_a_reference():
    for seed in range(50):
        tasks = make_tasks([person("Ann", "aabbccdd")], references=2, held_out=2, seed=seed)
        assert not keys(tasks[0].references) & {task.held_out.content_key() for task in tasks}
        assert len({task.held_out.content_key() for task in tasks}) == 2


def test_one_distinct_photo_is_refused_by_name():
    with pytest.raises(DataError, match=r"'Ann' has 3 photos and 1 distinct"):
        make_tasks([person("Bob", "ab"), person("Ann", "aaa")])


@pytest.mark.parametrize("options", [{"references": 0}, {"held_out": 0}, {"seeds": 0}, {"seeds": []}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(DataError, match="is 0: a test takes at least 1"):
        make_tasks([person("Ann", "abc")], **options)


def test_repeated_seeds_are_refused():
    with pytest.raises(DataError, match=r"\[3, 3\]"):
        make_tasks([person("Ann", "abc")], seeds=[3, 3])


def test_adding_people_changes_nothing_for_the_others():
    few, many = [person(f"p{i}", "abcdefghijklmn") for i in (1, 10, 2)], [person("p3", "abc"), person("p0", "abcd")]
    tasks = make_tasks([*many, *few])
    assert [task for task in tasks if task.person in {"p1", "p10", "p2"}] == make_tasks(few)
    assert list(dict.fromkeys(task.person for task in tasks)) == ["p0", "p1", "p2", "p3", "p10"]  # natural order


def test_noise_differs_between_seeds_photos_and_people_and_is_kept_where_seeds_are_added():
    people = [person(f"p{i}", "abcdefghijklmn") for i in range(20)]
    one, three = make_tasks(people, seeds=1), make_tasks(people, seeds=3)
    assert len({task.seed for task in three}) == len(three) == 20 * 4 * 3
    assert three[::3] == one
    assert make_tasks(people, seeds=[2]) == three[2::3]
    assert all(0 <= task.seed < 2**32 for task in three)


def test_another_seed_draws_other_references_and_noise():
    a, b = (make_tasks([person("Ann", "abcdefghijklmn")], seed=seed) for seed in (0, 1))
    assert a[0].references != b[0].references
    assert not {task.seed for task in a} & {task.seed for task in b}


def test_draws_are_even():
    drawn = Counter(
        photo.name[-5]
        for i in range(400)
        for photo in {task.held_out for task in make_tasks([person(f"p{i}", "abcdefgh")], references=4, held_out=4)}
    )
    assert sum(drawn.values()) == 1600
    assert all(140 <= count <= 260 for count in drawn.values())  # 200 expected, standard deviation 10


def test_the_draw_is_the_same_on_every_machine():
    tasks = make_tasks([person("Ann", "abcdefghijklmn")], seed=7)
    assert [task.held_out.name[-6:-4] for task in tasks] == ["00", "03", "05", "12"]
    assert tasks[0].seed == 56266295


def test_the_protocol_counts_and_its_fingerprint_ignores_order_alone():
    tasks = make_tasks([person("Ann", "abcdefghijklmn"), person("Bob", "abcdefghij")], seeds=2)
    facts = protocol(tasks)
    fingerprint = facts.pop("sha256")
    assert facts == {"people": 2, "tasks": 10, "held_out": 5, "references": 9, "seeds": 2}
    assert protocol(tasks[::-1])["sha256"] == fingerprint
    first = tasks[0]
    changes = [
        {"person": "Cid"},
        {"prompt": "another"},
        {"seed": first.seed + 1},
        {"references": first.references[1:]},
        {"references": first.references[::-1]},
        {"held_out": replace(first.held_out, content="edited")},
    ]
    for change in changes:
        assert protocol([replace(first, **change), *tasks[1:]])["sha256"] != fingerprint
    assert protocol(tasks[1:])["sha256"] != fingerprint


def test_the_protocol_of_no_tasks_is_refused():
    with pytest.raises(ValueError, match="no tasks"):
        protocol([])


def test_every_task_has_its_own_file_also_where_photos_differ_in_their_suffix_alone():
    who = person("Ann", "abc")
    names = ["1.jpg", "1.png", "2.jpg"]
    photos = tuple(replace(photo, name=name) for photo, name in zip(who.photos, names, strict=True))
    tasks = make_tasks([Person("Ann", photos)], references=1, held_out=2, seeds=2)
    tasks += make_tasks([Person("Bob", tuple(replace(photo, person="Bob") for photo in photos))], seeds=2)
    everything = [replace(tasks[0], held_out=photo) for photo in photos for _ in range(2)]
    files = image_files(everything)
    assert files == [f"Ann/{stem}_s{k}.png" for stem in ("1.jpg", "1.png", "2") for k in (0, 1)]
    assert len(set(image_files(tasks))) == len(tasks)
    assert {PurePath(file).parent.name for file in image_files(tasks)} == {"Ann", "Bob"}


def test_intruders_take_the_place_of_so_many_references_and_change_nothing_else():
    tasks = make_tasks([person(f"p{i}", "abcdefghijklmn") for i in range(30)], seeds=2)
    assert add_intruders(tasks, 0) == tasks
    held_out = {task.held_out for task in tasks}
    for count in (1, 3, 9):
        mixed = add_intruders(tasks, count)
        places: Counter[int] = Counter()
        for before, after in zip(tasks, mixed, strict=True):
            assert replace(after, references=before.references) == before
            changed = [i for i in range(9) if after.references[i] != before.references[i]]
            assert len(changed) == count
            assert all(after.references[i].person != after.person for i in changed)
            assert not set(after.references) & held_out
            places.update(changed)
        assert {len({t.references for t in mixed if t.person == f"p{i}"}) for i in range(30)} == {1}
        assert len(places) == 9  # also the first, which single-photo methods see
        assert protocol(mixed)["sha256"] != protocol(tasks)["sha256"]
    assert add_intruders(tasks, 3) == add_intruders(tasks, 3) != add_intruders(tasks, 3, seed=1)
    for count, some, message in (
        (10, tasks, "give 0 to 9"),
        (-1, tasks, "give 0 to 9"),
        (1, tasks[:8], "one person only"),
    ):
        with pytest.raises(DataError, match=message):
            add_intruders(some, count)
