import subprocess
import sys

import pytest
from folders import names, save

from lit_multiip.data import (
    DataError,
    DrawnPhoto,
    Folder,
    MiniFaces,
    check_photos,
    mini_faces,
    read_person,
    select_people,
    split_people,
)


def test_folders_are_people_in_natural_order(photos):
    people = Folder(str(photos)).people()
    assert [(person.name, len(person.photos)) for person in people] == [("Ann_Lee", 12), ("Bo", 3), ("Cy", 10)]
    assert [photo.name for photo in people[0].photos] == [f"Ann_Lee_{i}.jpg" for i in range(1, 13)]
    assert people == Folder(str(photos)).people()
    assert {person.split for person in people} == {None}


def test_hidden_files_and_other_types_are_not_photos(photos, caplog):
    save(photos / ".git" / "x.jpg")
    save(photos / "Bo" / "._Bo_1.jpg")
    (photos / "Bo" / ".DS_Store").write_bytes(b"x")
    (photos / "Bo" / "phone.heic").write_bytes(b"x")
    save(photos / "Bo" / "Bo_4.PNG")
    people = Folder(str(photos)).people()
    assert names(people) == ["Ann_Lee", "Bo", "Cy"]
    assert [photo.name for photo in people[1].photos] == ["Bo_1.jpg", "Bo_2.jpg", "Bo_3.jpg", "Bo_4.PNG"]
    assert "phone.heic" in caplog.text and ".DS_Store" not in caplog.text


def test_links_that_form_a_loop_end(photos):
    (photos / "Bo" / "up").symlink_to(photos)
    (photos / "Dee").symlink_to(photos)
    (photos / "self").symlink_to(photos / "self")
    assert names(Folder(str(photos)).people()) == ["Ann_Lee", "Bo", "Cy"]


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x"), lambda p: save(p / "1.jpg")]
)
def test_a_folder_without_people_is_named(tmp_path, make):
    make(tmp_path / "gone")
    with pytest.raises(DataError, match="gone"):
        Folder(str(tmp_path / "gone")).people()


def test_one_persons_folder_reads_as_it_does_among_others(photos):
    assert read_person(photos / "Bo") == Folder(str(photos)).people()[1]
    with pytest.raises(DataError, match="holds the folders of 3 people"):
        read_person(photos)


def test_drawn_people_have_their_roles_disjoint_indices():
    people = MiniFaces(seed=3, train=12, validation=2, test=4, photos=5).people()
    assert names(people)[:2] == ["test_000000", "test_000001"]
    for side, count in {"train": 12, "validation": 2, "test": 4}.items():
        shots = [photo for person in people if person.split == side for photo in person.photos]
        assert len(shots) == count * 5
        assert all(isinstance(photo, DrawnPhoto) and photo.index in mini_faces.ROLES[side] for photo in shots)
    assert check_photos(people, progress=False) == people
    split = split_people(select_people(people, min_photos=5))
    assert [len(side) for side in (split.train, split.validation, split.test)] == [12, 2, 4]


@pytest.mark.parametrize("wrong", [{"train": 0}, {"test": -1}, {"validation": 1_000_001}, {"photos": 0}, {"seed": -1}])
def test_impossible_numbers_of_drawn_people_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(DataError, match=name):
        MiniFaces(**wrong)


def test_importing_people_loads_neither_torch_nor_sklearn():
    code = "import sys, lit_multiip.data; print({'torch', 'sklearn', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
