import importlib
import io
import os
import stat
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lit_multiip.data import LFW, DataError, check_photos, select_people, split_people
from lit_multiip.data import lfw as lfw_module

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared" / "lfw-deepfunneled"
real_photos = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/lfw-deepfunneled")


def jpeg(size: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(buffer, "JPEG")
    return buffer.getvalue()


FILES = {
    f"lfw/{who}/{who}_{i:04d}.jpg": jpeg() for who, count in (("Al_Bo", 2), ("Cy_Di", 3)) for i in range(1, count + 1)
}


def found(source: LFW) -> list[tuple[str, int]]:
    return [(person.name, len(person.photos)) for person in source.people()]


EXPECTED = [("Al_Bo", 2), ("Cy_Di", 3)]


def write_tar(path: Path, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def write_zip(path: Path, *extra: tuple[zipfile.ZipInfo, str]) -> Path:
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("lfw/", b"")
        for name, data in FILES.items():
            container.writestr(name, data)
        for info, text in extra:
            container.writestr(info, text)
    return path


def write_folder(path: Path) -> Path:
    for name, data in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("inner", ["", "lfw", "lfw_funneled", "lfw-deepfunneled", "lfw-deepfunneled/lfw-deepfunneled"])
def test_a_folder_is_read_at_any_usual_depth(tmp_path: Path, inner: str) -> None:
    (tmp_path / "data" / inner).parent.mkdir(parents=True, exist_ok=True)
    os.rename(write_folder(tmp_path / "x") / "lfw", tmp_path / "data" / inner)
    assert found(LFW(str(tmp_path / "data"))) == EXPECTED


def test_a_link_back_to_itself_ends(tmp_path: Path) -> None:
    root = write_folder(tmp_path) / "lfw"
    (root / "lfw").symlink_to(root)
    assert found(LFW(str(root))) == EXPECTED


@pytest.mark.parametrize(("name", "write"), [("a.tgz", write_tar), ("a.tar.gz", write_tar), ("A.ZIP", write_zip)])
def test_an_archive_is_extracted_once_and_leaves_nothing_else(tmp_path: Path, name: str, write: object) -> None:
    archive = write(tmp_path / name)  # type: ignore[operator]
    assert found(LFW(str(archive))) == EXPECTED
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.extracted"}
    archive.write_bytes(b"unread from now on")
    assert found(LFW(str(archive))) == EXPECTED
    assert not os.access(tmp_path / f"{name}.extracted" / next(iter(FILES)), os.X_OK)


def test_an_archive_can_be_extracted_elsewhere(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tgz")
    assert found(LFW(str(archive), data_home=str(tmp_path / "new" / "home"))) == EXPECTED
    assert [path.name for path in (tmp_path / "new" / "home").iterdir()] == ["a.tgz.extracted"]


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, 1 if kind == tarfile.REGTYPE else 0
    return info


def zip_member(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


@pytest.mark.parametrize(
    "member",
    [
        tar_member("../evil.jpg"),
        tar_member("lfw/../../evil.jpg"),
        tar_member("/evil.jpg"),
        tar_member("..\\evil.jpg"),
        tar_member("C:\\evil.jpg"),
        tar_member("lfw/evil.jpg", tarfile.SYMTYPE, "Al_Bo/Al_Bo_0001.jpg"),
        tar_member("lfw/evil.jpg", tarfile.LNKTYPE, "/etc/passwd"),
        tar_member("lfw/evil.jpg", tarfile.CHRTYPE),
        tar_member("lfw/evil.jpg", tarfile.FIFOTYPE),
        zip_member("../evil.jpg"),
        zip_member("/evil.jpg"),
        zip_member("lfw/evil.jpg", stat.S_IFLNK | 0o777),
        zip_member("lfw/evil.jpg", stat.S_IFCHR | 0o666),
    ],
    ids=lambda member: f"{type(member).__name__}",
)
def test_an_unsafe_archive_leaves_nothing_behind(tmp_path: Path, member: tarfile.TarInfo | zipfile.ZipInfo) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if isinstance(member, tarfile.TarInfo):
        archive = write_tar(home / "a.tgz", member)
    else:
        archive = write_zip(home / "a.zip", (member, "../../etc/passwd"))
    with pytest.raises(DataError, match="evil"):
        LFW(str(archive)).people()
    assert [path.name for path in home.iterdir()] == [archive.name]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_a_damaged_archive_is_refused_and_leaves_nothing_behind(tmp_path: Path, name: str, keep: float) -> None:
    whole = (write_zip if name.endswith("zip") else write_tar)(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=rf"{name}.*fetch it again"):
        LFW(str(tmp_path / name)).people()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_extraction_that_another_process_finished_first_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_tar(tmp_path / "a.tgz")
    unpack = lfw_module.unpack

    def slow(archive: Path, folder: Path) -> None:
        unpack(archive, folder)
        write_folder(tmp_path / "a.tgz.extracted")

    monkeypatch.setattr(lfw_module, "unpack", slow)
    assert found(LFW(str(archive))) == EXPECTED
    assert {path.name for path in tmp_path.iterdir()} == {"a.tgz", "a.tgz.extracted"}


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "lfw.rar").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    write_tar(tmp_path / "a.tgz")
    for source, message in {
        LFW(str(tmp_path / "gone")): "gone does not exist",
        LFW(str(tmp_path / "lfw.rar")): r"lfw\.rar.*\.tgz",
        LFW(str(tmp_path / "a.tgz"), data_home=str(tmp_path / "file")): "set data_home",
        LFW(): "set download to true",
    }.items():
        with pytest.raises(DataError, match=message):
            source.people()


def test_download_uses_the_files_and_checks_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(data_home: str, **_: object) -> None:
        calls.append(data_home)
        write_folder(tmp_path)
        (tmp_path / "lfw_home").mkdir()
        (tmp_path / "lfw").rename(tmp_path / "lfw_home" / "lfw_funneled")
        (tmp_path / "lfw_home" / "lfw_funneled" / "pairs_01.txt").write_text("x")

    monkeypatch.setattr("sklearn.datasets.fetch_lfw_people", fetch)
    source = LFW(download=True, data_home=str(tmp_path))
    with pytest.raises(DataError, match="5 of LFW's 13233 photos: delete it"):
        source.people()
    monkeypatch.setattr(lfw_module, "PHOTOS", 5)
    assert found(source) == EXPECTED
    assert calls == [str(tmp_path)]  # not fetched again


def test_a_missing_network_says_to_give_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(**_: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_lfw_people", fetch)
    with pytest.raises(DataError, match=r"no route to host.*set path"):
        LFW(download=True, data_home=str(tmp_path)).people()


@real_photos
def test_real_photos_split_two_to_one() -> None:
    people = LFW(str(SHARED)).people()
    kept = select_people(people, min_photos=10)
    assert (len(people), len(kept)) == (108, 100)
    split = split_people(kept, seed=0)
    assert (len(split.train), len(split.validation), len(split.test)) == (59, 7, 34)
    photo = kept[0].photos[0]
    assert photo.name == f"{photo.person}_0001.jpg" and photo.image().size == (250, 250)
    assert photo.prompt == "a photo of a person"


@real_photos
def test_real_photos_are_all_readable_and_distinct() -> None:
    people = LFW(str(SHARED)).people()
    assert check_photos(people, progress=False) == people
    keys = [photo.content_key() for person in people for photo in person.photos]
    assert len(keys) == len(set(keys)) == 1348


@pytest.mark.parametrize(("name", "path"), [("folder", "photos"), ("lfw", None)])
def test_the_shipped_config_constructs_its_source(name: str, path: str | None) -> None:
    text = (REPOSITORY / "configs" / "data" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    source = yaml.safe_load(text)["data"]["source"]
    cls = getattr(importlib.import_module("lit_multiip.data"), source["class_path"])  # by its name alone
    assert cls(**source["init_args"]).path == path
