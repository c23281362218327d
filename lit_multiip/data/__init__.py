"""People and their photos: sources, choice, split. Importing this loads neither torch nor scikit-learn."""

from lit_multiip.data.lfw import LFW
from lit_multiip.data.people import Folder, MiniFaces, PeopleSource, Person, Unreadable, check_photos, read_person
from lit_multiip.data.photos import DataError, DrawnPhoto, FilePhoto, Photo
from lit_multiip.data.split import Split, select_people, split_people

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
