import logging
import unicodedata
from pathlib import Path

import pytest
from folders import names, people_of

from lit_multiip.data import DataError, Folder, MiniFaces, Person, Split, select_people, split_people


def test_people_with_too_few_photos_are_left_out_and_counted(photos, caplog):
    people = Folder(str(photos)).people()
    with caplog.at_level(logging.INFO):
        assert names(select_people(people)) == ["Ann_Lee", "Cy"]
    assert "left out 1 of 3 people" in caplog.text
    with pytest.raises(DataError, match=r"none of 3 people has min_photos = 13 .*Ann_Lee has the most, 12"):
        select_people(people, min_photos=13)
    for wrong in ({"min_photos": 1}, {"max_people": 0}):
        with pytest.raises(DataError, match=r"is [01]:"):
            select_people(people, **wrong)


def test_max_people_keeps_a_seeded_nested_subset():
    people = people_of(40)
    ten, twenty = (names(select_people(people, max_people=n, seed=1)) for n in (10, 20))
    assert len(ten) == 10 and ten == sorted(ten) and set(ten) < set(twenty)
    assert ten == names(select_people(people, max_people=10, seed=1)) != names(select_people(people, max_people=10))
    assert select_people(people, max_people=99) == people


@pytest.mark.parametrize(("count", "sizes"), [(158, (94, 11, 53)), (60, (36, 4, 20)), (3, (1, 1, 1))])
def test_the_seeded_split_is_two_to_one_by_person(count, sizes):
    people = people_of(count)
    split = split_people(people, seed=5)
    assert (len(split.train), len(split.validation), len(split.test)) == sizes
    assert sorted(names(split.train + split.validation + split.test)) == names(people)
    assert split_people(people[::-1], seed=5) == split
    if count > 3:
        assert split_people(people, seed=6) != split


def test_a_split_without_enough_people_says_what_to_do():
    for count in (0, 1, 2):
        with pytest.raises(DataError, match="people cannot be divided"):
            split_people(people_of(count))
    with pytest.raises(DataError, match="test_fraction"):
        split_people(people_of(4), test_fraction=0.9)
    for wrong in ({"test_fraction": 0.0}, {"validation_fraction": 1.0}, {"test_fraction": float("nan")}):
        with pytest.raises(DataError, match="between 0 and 1"):
            split_people(people_of(9), **wrong)


def test_a_test_fraction_of_one_makes_test_people_of_everyone_whatever_source_and_lists_say(tmp_path):
    (tmp_path / "train.txt").write_text("p001\nnobody\n")
    drawn = MiniFaces(train=3, validation=1, test=2, photos=10).people()
    for people in (people_of(1), people_of(12), drawn):
        split = split_people(people[::-1], test_fraction=1, train_names=str(tmp_path / "train.txt"))
        assert (split.train, split.validation) == ([], []) and split.test == people
    with pytest.raises(DataError, match=r"validation_fraction is 1: it must lie between 0 and 1, both excluded$"):
        split_people(people_of(9), validation_fraction=1)
    with pytest.raises(DataError, match=r"test_fraction is 1\.5: .*1 makes test people of everyone"):
        split_people(people_of(9), test_fraction=1.5)


def test_a_split_refuses_overlap_and_empty_sides():
    a, b, c = people_of(3)
    with pytest.raises(DataError, match=r"no test people \(2 train, 1 validation, 0 test\)"):
        Split([a, b], [c], [])
    with pytest.raises(DataError, match="p001"):
        Split([a, b], [c], [b])


def listed(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return str(path)


def test_lists_of_names_decide(tmp_path):
    people = people_of(12)
    train = listed(tmp_path / "train.txt", *(f"p{i:03d}" for i in range(5)))
    test = listed(tmp_path / "test.txt", "", "p007 ", "p009")
    validation = listed(tmp_path / "validation.txt", "p008")
    only_test = split_people(people, test_names=test)
    assert names(only_test.test) == ["p007", "p009"] and len(only_test.train + only_test.validation) == 10
    only_train = split_people(people, train_names=train)
    assert len(only_train.train) == 4 and names(only_train.test) == [f"p{i:03d}" for i in range(5, 12)]
    everything = split_people(people, train_names=train, test_names=test, validation_names=validation)
    assert [len(side) for side in (everything.train, everything.validation, everything.test)] == [5, 1, 2]
    drawn = split_people(people, validation_names=validation)
    assert names(drawn.validation) == ["p008"] and (len(drawn.train), len(drawn.test)) == (7, 4)


def test_lists_in_lfws_own_format_may_name_people_that_were_left_out(tmp_path):
    rows = [f"p{i:03d}\t10" for i in range(6)]
    train = listed(tmp_path / "peopleDevTrain.txt", "8", *rows, "Too_Few\t1", "Absent\t2")
    test = listed(tmp_path / "peopleDevTest.txt", "1", "p007\t10")
    split = split_people(people_of(9), train_names=train, test_names=test)
    assert len(split.train + split.validation) == 6 and names(split.test) == ["p007"]
    with pytest.raises(DataError, match="announces 8 people and has 6"):
        split_people(people_of(9), train_names=listed(tmp_path / "cut.txt", "8", *rows))


def test_a_list_of_numbers_is_not_taken_for_lfws_format(tmp_path):
    people = [Person(str(i), ()) for i in range(5)]
    assert names(split_people(people, test_names=listed(tmp_path / "test.txt", "1", "3")).test) == ["1", "3"]


def test_a_list_at_fault_is_named(tmp_path):
    people, good = people_of(9), listed(tmp_path / "good.txt", "p001", "p002")
    for lines, message in {
        ("p001",): r"p001 is in both .*good\.txt and .*bad\.txt",
        ("p003", "Nobody"): r"bad\.txt names Nobody.*9 people",
        ("",): "is empty",
    }.items():
        with pytest.raises(DataError, match=message):
            split_people(people, train_names=good, test_names=listed(tmp_path / "bad.txt", *lines))
    with pytest.raises(DataError, match=r"gone\.txt cannot be read"):
        split_people(people, test_names=str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="no train people"):
        split_people(people, test_names=listed(tmp_path / "all.txt", *names(people)))


def test_names_are_compared_whatever_their_composition(tmp_path):
    people = [*people_of(6), Person(unicodedata.normalize("NFD", "Zoë"), ())]
    test = listed(tmp_path / "test.txt", unicodedata.normalize("NFC", "Zoë"))
    assert split_people(people, test_names=test).test == [people[-1]]


def test_a_split_fixed_by_the_source_takes_no_lists(tmp_path):
    people = MiniFaces(train=3, validation=1, test=2, photos=2).people()
    with pytest.raises(DataError, match="remove test_names"):
        split_people(people, test_names=listed(tmp_path / "x.txt", people[0].name))
    with pytest.raises(DataError, match="p000: None"):
        split_people([*people, *people_of(1)])
    with pytest.raises(DataError, match="no test people"):
        split_people([person for person in people if person.split != "test"])
