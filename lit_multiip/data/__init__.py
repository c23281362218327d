"""People and their photos: sources, choice, split. Importing this loads neither torch nor scikit-learn."""

from lit_multiip.data.lfw import LFW
from lit_multiip.data.people import (
    DataError,
    DrawnPhoto,
    FilePhoto,
    Folder,
    MiniFaces,
    PeopleSource,
    Person,
    Photo,
    Split,
    Unreadable,
    check_photos,
    read_person,
    select_people,
    split_people,
)

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
