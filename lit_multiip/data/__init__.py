"""People and their photos: sources, choice, split. Importing this loads neither torch nor scikit-learn."""

from lit_multiip.data.lfw import LFW
from lit_multiip.data.people import (
    Folder,
    MiniFaces,
    PeopleSource,
    Person,
    Split,
    Unreadable,
    check_photos,
    read_person,
    select_people,
    split_people,
)
from lit_multiip.data.photos import DataError, DrawnPhoto, FilePhoto, Photo

__all__ = [
    "LFW",
    "DataError",
    "DrawnPhoto",
    "FilePhoto",
    "Folder",
    "MiniFaces",
    "PeopleSource",
    "Person",
    "Photo",
    "Split",
    "Unreadable",
    "check_photos",
    "read_person",
    "select_people",
    "split_people",
]
