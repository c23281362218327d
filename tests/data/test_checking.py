import os
from pathlib import Path

import pytest
from folders import save

from lit_multiip.data import DataError, Folder, check_photos


def faulty(folder: Path) -> set[str]:
    """Write photos that cannot be used; return their names."""
    whole = save(folder / "whole.jpg", (64, 64)).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "broken_link.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    save(folder / "pixel.png", (1, 1))
    save(folder / "flat.png", (64, 15))
    save(folder / "gif.tmp", format="GIF").rename(folder / "really_a_gif.jpg")
    png = bytearray(save(folder / "damaged.png", (64, 64)).read_bytes())
    png[45] ^= 0xFF  # inside IDAT: the checksum fails
    (folder / "damaged.png").write_bytes(png)
    save(folder / "small_enough.png", (16, 16))
    return {path.name for path in folder.iterdir()} - {"whole.jpg", "small_enough.png"}


def test_every_unreadable_photo_is_named_in_one_error(tmp_path):
    bad = faulty(tmp_path / "Bo")
    people = Folder(str(tmp_path)).people()
    with pytest.raises(DataError, match=f"{len(bad)} of {len(bad) + 2} photos") as error:
        check_photos(people, progress=False)
    assert len(bad) == 9
    assert {name for name in bad if f"{name}: " in str(error.value)} == bad
    assert "whole.jpg" not in str(error.value) and "small_enough" not in str(error.value)


def test_unreadable_photos_are_skipped_if_asked(tmp_path, caplog):
    bad = faulty(tmp_path / "Bo")
    (tmp_path / "Cy").mkdir()
    (tmp_path / "Cy" / "only.jpg").write_bytes(b"")
    (person,) = check_photos(Folder(str(tmp_path)).people(), "skip", progress=False)
    assert [photo.name for photo in person.photos] == ["small_enough.png", "whole.jpg"]
    assert all(name in caplog.text for name in {*bad, "only.jpg"})
    (tmp_path / "Bo" / "whole.jpg").unlink()
    (tmp_path / "Bo" / "small_enough.png").unlink()
    with pytest.raises(DataError, match="no readable photo is left"):
        check_photos(Folder(str(tmp_path)).people(), "skip", progress=False)
    with pytest.raises(DataError, match="'ignore'"):
        check_photos([], "ignore")


def test_readable_photos_pass_unchanged_with_a_progress_bar(photos, capsys):
    people = Folder(str(photos)).people()
    assert check_photos(people) == people
    assert "checking photos" in (shown := capsys.readouterr().err) and "25/25" in shown
