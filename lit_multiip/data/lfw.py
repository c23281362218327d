"""Labeled Faces in the Wild, deep-funneled or funneled: from a folder, an archive, or scikit-learn's downloader."""

from __future__ import annotations

import gzip
import http.client
import logging
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import IO

from tqdm import tqdm

from lit_multiip.data.captions import TEMPLATE, check_template
from lit_multiip.data.people import Folder, PeopleSource, Person
from lit_multiip.data.photos import DataError

logger = logging.getLogger(__name__)

ARCHIVES = (".tgz", ".tar.gz", ".zip")
FOLDERS = ("lfw-deepfunneled", "lfw_funneled", "lfw-funneled", "lfw")
PHOTOS = 13_233  # in the whole data set


class LFW(PeopleSource):
    """Labeled Faces in the Wild: ``Person_Name/Person_Name_0001.jpg``, 250 x 250 px, 5749 people.

    Args:
        path: The folder of the people's folders, or one that holds it as ``lfw-deepfunneled``, ``lfw_funneled`` or
            ``lfw``; or an archive (``.tgz``, ``.tar.gz``, ``.zip``), extracted once to ``<archive>.extracted``.
        template: Prompt of photos without a caption; see :class:`Folder`.
        download: Where no path is given, have scikit-learn fetch and verify the funneled photos (about 230 MB).
        data_home: Where archives are extracted (default: beside them) and downloads go (default: scikit-learn's own).
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
        """Find the photos, extracting or downloading them if need be; see :meth:`PeopleSource.people`."""
        if self.path is None:
            return self._downloaded()
        root = Path(self.path).expanduser()
        if root.is_file():
            if not root.name.lower().endswith(ARCHIVES):
                raise DataError(f"{root} is no archive that can be read: give a folder or {', '.join(ARCHIVES)}")
            home = root.parent if self.data_home is None else Path(self.data_home).expanduser()
            root = extract(root, home / f"{root.name}.extracted")
        elif not root.exists():
            raise DataError(f"LFW path {root} does not exist: give a folder or an archive, or null and download: true")
        return Folder(str(_people_folder(root)), self.template).people()

    def _downloaded(self) -> list[Person]:
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
    """Step into ``lfw``, ``lfw_funneled``, ...; archives nest them up to three deep."""
    for _ in range(3):
        root = next((root / name for name in FOLDERS if (root / name).is_dir()), root)
    return root


def extract(archive: Path, target: Path) -> Path:
    """Extract an archive to the folder ``target``, all or nothing, and return it; where it exists it is used as it is.

    Raises:
        DataError: The archive is damaged, has a member that is a link or a device or lies outside, or ``target`` cannot
            be written.
    """
    if target.exists():
        logger.info("%s was extracted before: using %s (delete it to extract anew)", archive, target)
        return target
    work: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
        for name, source in tqdm(_members(archive), f"extracting {archive.name}", unit="file"):
            path = Path(work, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
        os.chmod(work, 0o755)  # mkdtemp's is the owner's alone
        try:
            os.replace(work, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    except (
        tarfile.TarError,
        gzip.BadGzipFile,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        RuntimeError,
    ) as error:
        raise DataError(f"archive {archive} is damaged or locked ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"archive {archive} cannot be extracted to {target} ({error}): set data_home") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (relative path, open file) of every regular file; anything else but a folder is refused by name."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as container:
            for info in container.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                _refuse_unsafe(archive, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                if not info.is_dir():
                    yield info.filename, container.open(info)
        return
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            _refuse_unsafe(archive, member.name, member.isreg() or member.isdir())
            if (source := tar.extractfile(member)) is not None:
                yield member.name, source


def _refuse_unsafe(archive: Path, name: str, plain: bool) -> None:
    path = PureWindowsPath(name)  # understands both / and \
    if not plain:
        raise DataError(
            f"archive {archive} holds {name!r}, a link or a device: refused, extract what you trust by hand"
        )
    if path.drive or path.root or ".." in path.parts:
        raise DataError(
            f"archive {archive} holds {name!r}, which lies outside: refused, extract what you trust by hand"
        )
