"""Labeled Faces in the Wild, deep-funneled or funneled: from a folder, an archive, or scikit-learn's downloader."""

from __future__ import annotations

import gzip
import http.client
import logging
import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

from lit_multiip.data.captions import TEMPLATE, check_template
from lit_multiip.data.people import Folder, PeopleSource, Person
from lit_multiip.data.photos import DataError

logger = logging.getLogger(__name__)

ARCHIVES = (".tgz", ".tar.gz", ".zip")
FOLDERS = ("lfw-deepfunneled", "lfw_funneled", "lfw-funneled", "lfw")
PHOTOS = 13_233  # in the whole data set
DAMAGED = (
    tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError,
)  # fmt: skip


class LFW(PeopleSource):
    """Labeled Faces in the Wild: `Person_Name/Person_Name_0001.jpg`, 250 x 250 px, 5749 people.

    Args:
        path: the folder of the people's folders, or one that holds it as `lfw-deepfunneled`, `lfw_funneled` or `lfw`;
            or an archive (`.tgz`, `.tar.gz`, `.zip`), extracted once to `<archive>.extracted`.
        template: prompt of photos without a caption; see `Folder`.
        download: where no path is given, have scikit-learn fetch and verify the funneled photos (about 230 MB).
        data_home: where archives are extracted (default: beside them) and downloads go (default: scikit-learn's own).
    """

    def __init__(
        self,
        path: str | None = None,
        template: str = TEMPLATE,
        download: bool = False,
        data_home: str | None = None,
    ) -> None:
        self.path = path
        self.template = check_template(template)
        self.download = download
        self.data_home = data_home

    def people(self) -> list[Person]:
        """Find the photos, extracting or downloading them if need be; see `PeopleSource.people`."""
        if self.path is None:
            return self._download()
        root = Path(self.path).expanduser()
        if root.is_file():
            if not root.name.lower().endswith(ARCHIVES):
                raise DataError(f"{root} is not an archive that can be read: give a folder or {', '.join(ARCHIVES)}")
            home = root.parent if self.data_home is None else Path(self.data_home).expanduser()
            root = extract(root, home / f"{root.name}.extracted")
        elif not root.exists():
            raise DataError(f"LFW path {root} does not exist: give a folder or an archive, or null and download: true")
        return Folder(str(_people_folder(root)), self.template).people()

    def _download(self) -> list[Person]:
        if not self.download:
            raise DataError("LFW has no path: set it to the folder or archive of the photos, or set download to true")
        from sklearn.datasets import fetch_lfw_people, get_data_home

        folder = Path(get_data_home(self.data_home)) / "lfw_home" / "lfw_funneled"
        if not folder.exists():
            logger.warning("downloading LFW (about 230 MB) to %s", folder)
            try:  # for its files, checked by SHA-256: the arrays, of the one person with 500 photos, are not used
                fetch_lfw_people(data_home=self.data_home, min_faces_per_person=500, resize=0.1)
            except (OSError, http.client.HTTPException) as error:
                raise DataError(
                    f"LFW cannot be downloaded ({error}): get lfw-deepfunneled.tgz by other means and set path to it"
                ) from error
        people = Folder(str(folder), self.template).people()
        if (found := sum(len(person.photos) for person in people)) != PHOTOS:
            raise DataError(f"{folder} has {found} of LFW's {PHOTOS} photos: delete it and run again, or set path")
        return people


def _people_folder(root: Path) -> Path:
    """Step into `lfw`, `lfw_funneled`, ...; archives nest them up to three deep."""
    for _ in range(3):
        root = next((root / name for name in FOLDERS if (root / name).is_dir()), root)
    return root


def extract(archive: Path, target: Path) -> Path:
    """Extract an archive to the folder `target`, all or nothing, and return it; a folder that exists is used as it is.

    Refused are archives that are damaged, and those with a member that is a link or a device or lies outside.
    """
    if target.exists():
        logger.info("%s was extracted before: using %s (delete it to extract anew)", archive, target)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
            whole = Path(work, "photos")
            unpack(archive, whole)
            try:
                os.replace(whole, target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
    except DAMAGED as error:
        raise DataError(f"archive {archive} is damaged or locked ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"archive {archive} cannot be extracted to {target} ({error}): set data_home") from error
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack files and folders of a .zip or .tgz file by the standard library; any other member is refused by name."""

    def check(name: str, plain: bool) -> None:
        path = PureWindowsPath(name)  # understands both / and \
        outside = path.drive or path.root or ".." in path.parts
        if outside or not plain:
            fault = "which lies outside" if outside else "a link or a device"
            raise DataError(f"archive {archive} holds {name!r}, {fault}: refused, extract what you trust by hand")

    def data_filter(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        check(member.name, member.isreg() or member.isdir())
        return tarfile.data_filter(member, path)

    folder.mkdir()
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in tqdm(zipped.infolist(), f"extracting {archive.name}", unit="file"):
                check(info.filename, stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR))
                zipped.extract(info, folder)
    else:
        with tarfile.open(archive, "r:gz") as tar:
            members = tqdm(tar, f"extracting {archive.name}", unit="file")
            tar.extractall(folder, members, filter=data_filter)
