"""Photos, people and tasks: what they are, where they come from, who trains and who tests. Loads no torch."""

from lit_multiip.data.checking import check_photos
from lit_multiip.data.hf_dataset import HFDataset
from lit_multiip.data.lfw import LFW
from lit_multiip.data.people import Folder, MiniFaces, PeopleSource, Person, read_person
from lit_multiip.data.photos import DataError, DrawnPhoto, FilePhoto, Photo
from lit_multiip.data.split import Split, select_people, split_people
from lit_multiip.data.tasks import Task, make_tasks

__all__ = [
    "LFW",
    "DataError",
    "DrawnPhoto",
    "FilePhoto",
    "Folder",
    "HFDataset",
    "MiniFaces",
    "PeopleSource",
    "Person",
    "Photo",
    "Split",
    "Task",
    "check_photos",
    "make_tasks",
    "read_person",
    "select_people",
    "split_people",
]
