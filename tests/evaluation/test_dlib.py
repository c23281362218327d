"""dlib's recogniser on real faces: who is told apart, what is not found, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_multiip.backbone import dlib_faces, onnx
from lit_multiip.backbone.dlib_faces import DlibDetector, detector_digest, five_of, load_detector, model_file
from lit_multiip.backbone.face_crop import CroppedPhoto, FaceCrop
from lit_multiip.data.people import Person
from lit_multiip.data.photos import FilePhoto
from lit_multiip.evaluation.faces import Dlib, mean_descriptor, read_mean
from lit_multiip.evaluation.results import describe_extractors
from lit_multiip.files import LitMultiIPError, package_file
from lit_multiip.pixels import square, to_tensor

LFW = Path(__file__).resolve().parents[2].parent / "shared" / "lfw-deepfunneled"
needs_lfw = pytest.mark.skipif(not LFW.is_dir(), reason="needs photos of LFW")
needs_dlib = pytest.mark.skipif(
    any(onnx.importlib.util.find_spec(name) is None for name in ("dlib", "face_recognition_models")),
    reason="needs dlib-bin and face-recognition-models",
)


@pytest.fixture(scope="module")
def dlib():
    return Dlib()


def faces_of(people: int, photos: int, side: int = 64) -> tuple[torch.Tensor, np.ndarray]:
    """Heads of LFW's first people, as many pixels as the small backbone draws."""
    folders = [folder for folder in sorted(LFW.iterdir()) if len(list(folder.glob("*.jpg"))) >= 10][:people]
    files = [file for folder in folders for file in sorted(folder.glob("*.jpg"))[:photos]]
    heads = [square(Image.open(file).convert("RGB").crop((50, 50, 200, 200)), side) for file in files]
    return to_tensor(heads), np.repeat(np.arange(people), photos)


@needs_dlib
@needs_lfw
def test_at_64_px_photos_of_one_person_are_near_and_those_of_others_are_not(dlib):
    images, who = faces_of(8, 2)
    embedding = dlib.extract(images).embedding
    assert embedding.shape == (16, 128) and not embedding.isnan().any()
    cosines = (embedding @ embedding.T).numpy()
    same = (who[:, None] == who) & ~np.eye(16, dtype=bool)
    others = who[:, None] != who
    assert cosines[same].mean() > 0.6 and abs(cosines[others].mean()) < 0.1
    np.fill_diagonal(cosines, -1)
    assert (who[cosines.argmax(axis=1)] == who).mean() > 0.9  # chance 0.07


@needs_dlib
@needs_lfw
def test_a_face_that_is_not_found_is_nan_and_leaves_the_others_alone(dlib):
    images, _ = faces_of(1, 2)
    holed = torch.cat([torch.zeros_like(images[:1]), images])
    found = dlib.extract(holed).embedding
    assert found.isnan().all(dim=1).tolist() == [True, False, False]
    assert torch.equal(found[1:], dlib.extract(images).embedding)
    prompts = ["a photo of a person smiling"] * 2 + ["a photo of a person"]
    agreement = dlib.prompt_agreement(holed, prompts)  # no face; a face; a prompt that names nothing
    assert agreement.isnan().tolist() == [True, False, True] and agreement[1] in (0, 1)


@needs_dlib
@needs_lfw
def test_landmarks_are_in_px_of_the_image_whatever_its_size():
    small, large = (faces_of(1, 1, side)[0][0].permute(1, 2, 0).numpy() for side in (64, 192))
    detector = DlibDetector()
    points = [detector.points(pixels) for pixels in (small, large)]
    assert all(each.shape == (68, 2) for each in points)
    assert np.abs(points[1] / 3 - points[0]).max() < 4
    five = five_of(points[1])
    assert np.allclose(detector.landmarks(large), five, atol=1e-3)
    eyes, mouth = five[:2], five[3:]
    assert eyes[0, 0] < eyes[1, 0] and (eyes[:, 1] < five[2, 1]).all() and (mouth[:, 1] > five[2, 1]).all()
    box = detector.boxes(large)[0]
    assert np.allclose(box, detector.faces(large)[0, :4]) and 60 < box[2] < 192


@needs_dlib
@needs_lfw
def test_photos_are_cut_at_the_face_that_dlib_finds(tmp_path, caplog):
    photo = Image.new("RGB", (500, 250), (90, 100, 110))
    photo.paste(Image.open(sorted(LFW.glob("*/*.jpg"))[0]), (250, 0))
    photo.save(tmp_path / "wide.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "none.png")
    photos = tuple(FilePhoto("Ann", name, "a photo", tmp_path / name) for name in ("wide.png", "none.png"))
    for _ in range(2):  # found, then remembered
        [person] = FaceCrop("dlib")([Person("Ann", photos)], tmp_path / "cache")
    first, second = person.photos
    assert isinstance(first, CroppedPhoto) and first.box[0] > 230 and first.box[2] == 250
    assert isinstance(second, CroppedPhoto) and second.box == (50, 0, 200)
    assert "1 of 2 photos have no face, such as 'none.png' of 'Ann'" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"faces-{detector_digest('dlib')}"]


@needs_dlib
def test_tests_by_another_mean_are_of_another_extractor(dlib, tmp_path):
    np.save(tmp_path / "mean.npy", np.zeros(128, np.float32))
    other = Dlib(str(tmp_path / "mean.npy"))
    ours, theirs = (describe_extractors([extractor])["dlib"] for extractor in (dlib, other))
    assert ours["source"] == theirs["source"] == dlib_faces.DESCRIPTOR and ours["can_identify"]
    assert len(ours["sha256"]) == 64 and ours["sha256"] != theirs["sha256"]
    assert ours["sha256"] == describe_extractors([Dlib()])["dlib"]["sha256"]
    with pytest.raises(LitMultiIPError, match="no face was found in any image"):
        mean_descriptor([np.zeros((64, 64, 3), np.uint8)])


def test_the_shipped_mean_is_that_of_descriptors_and_others_are_refused(tmp_path):
    mean = read_mean(package_file(Dlib.MEAN))
    assert np.linalg.norm(mean) == pytest.approx(1.31, abs=0.01)  # of descriptors of norm 1.43 on average
    for name, values in {"short.npy": np.zeros(64), "nan.npy": np.full(128, np.nan)}.items():
        np.save(tmp_path / name, values)
        with pytest.raises(LitMultiIPError, match=r"is no mean of dlib's descriptors .*give a \.npy of 128"):
            read_mean(tmp_path / name)
    with pytest.raises(LitMultiIPError, match="is no mean"):
        read_mean(tmp_path / "absent.npy")


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(onnx.importlib, "import_module", absent)
    with pytest.raises(LitMultiIPError, match=r"needs dlib \(dlib-bin\), which is not .* 'lit_multiip\[faces\]'"):
        Dlib()
    monkeypatch.setattr(dlib_faces, "find_spec", lambda name: None)
    with pytest.raises(LitMultiIPError, match=r"needs x\.dat of face-recognition-models, .* 'lit_multiip\[faces\]'"):
        model_file("x.dat")
    with pytest.raises(LitMultiIPError, match="side is 64"):
        DlibDetector(side=64)
    with pytest.raises(LitMultiIPError, match="needs dlib"):
        load_detector("dlib")
