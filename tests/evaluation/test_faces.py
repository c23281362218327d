from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from onnx_file import write_pooling
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from lit_multiip.backbone import onnx
from lit_multiip.backbone.faces import TEMPLATE, FaceDetector, aligned
from lit_multiip.backbone.onnx import weights_file
from lit_multiip.evaluation.callback import ScoreTest
from lit_multiip.evaluation.faces import FaceRecognition, SFace

cv2 = pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
LFW_CROP = (0.5, 0.48, 0.448)


@pytest.fixture(scope="module")
def pooling(tmp_path_factory):
    return str(write_pooling(tmp_path_factory.mktemp("onnx") / "pooling.onnx"))


def images_of(n, side=112, seed=0):
    """Smooth, so that one resampling is like another."""
    small = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(small, (side, side), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


class Found:
    """In place of a detector: a face where the image is not black, at landmarks that are turned and small."""

    turn = np.deg2rad(20)
    landmarks_ = (
        (TEMPLATE - 56) @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * 0.6 + 60
    ).astype(np.float32)

    def largest(self, pixels):
        return np.array([20, 20, 60, 60, *self.landmarks_.ravel(), 1], np.float32) if pixels.any() else None

    def landmarks(self, pixels):
        return self.landmarks_ if pixels.any() else None


def test_the_network_sees_normalised_channels_in_its_order(pooling):
    images = images_of(3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    values = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = F.normalize(F.avg_pool2d(values, 16).flatten(1), dim=1)
    extractor = FaceRecognition(pooling, mean=mean, std=std)
    torch.testing.assert_close(extractor.extract(images).embedding, expected, rtol=1e-4, atol=1e-5)
    other = FaceRecognition(pooling, mean=mean, std=std, colours="bgr")
    torch.testing.assert_close(other.extract(images.flip(1)).embedding, expected, rtol=1e-4, atol=1e-5)
    assert (extractor.name, extractor.num_features, extractor.can_identify) == ("pooling", None, True)
    assert extractor.extract(images).features is None


def test_the_crop_is_a_share_of_the_image_so_that_its_size_does_not_matter(pooling):
    extractor = FaceRecognition(pooling, crop=LFW_CROP)
    large = images_of(1, 250)
    pixels = large[0].permute(1, 2, 0).numpy()
    assert np.array_equal(extractor.network._face(pixels), pixels[64:176, 69:181])  # 112 px, centred at (125, 120)
    small = F.interpolate(large.float(), (500, 500), mode="bicubic").round().clamp(0, 255).to(torch.uint8)
    assert float(extractor.extract(large).embedding @ extractor.extract(small).embedding.T) > 0.9999


def test_a_network_of_fixed_batch_says_what_one_of_any_batch_says(pooling, tmp_path):
    fixed = FaceRecognition(str(write_pooling(tmp_path / "two.onnx", batch=2)))
    images = images_of(5)
    torch.testing.assert_close(fixed.extract(images).embedding, FaceRecognition(pooling).extract(images).embedding)


@pytest.mark.parametrize("network", [FaceRecognition, SFace])
def test_a_face_that_is_not_found_is_nan_and_leaves_the_others_alone(network, pooling):
    extractor = network(pooling, detector=Found())
    images = images_of(4, 120)
    images[[0, 2]] = 0
    embedding = extractor.extract(images).embedding
    assert embedding.isnan().all(dim=1).tolist() == [True, False, True, False]
    assert torch.equal(embedding[[1, 3]], extractor.extract(images[[1, 3]]).embedding)
    assert (
        extractor.extract(images[[0, 2]]).embedding.isnan().all()
        and extractor.extract(images[[0]]).embedding.shape == embedding[:1].shape
    )


def test_alignment_is_that_of_opencv(pooling):
    pixels = images_of(1, 120)[0].permute(1, 2, 0).numpy()
    reference = cv2.FaceRecognizerSF.create(pooling, "").alignCrop(pixels, Found().largest(pixels))
    mine = aligned(pixels, Found().landmarks_)
    assert np.abs(mine.astype(int) - reference.astype(int)).mean() < 1  # of 255
    assert np.abs(pixels[:112, :112].astype(int) - reference.astype(int)).mean() > 10


def test_sface_is_its_network_on_the_aligned_face_in_rgb_of_0_to_255(pooling):
    images = images_of(3, 120)
    by_onnxruntime = (
        FaceRecognition(pooling, mean=(0, 0, 0), std=(1 / 255,) * 3, detector=Found()).extract(images).embedding
    )
    by_opencv = SFace(pooling, detector=Found()).extract(images).embedding
    assert float((by_opencv * by_onnxruntime).sum(dim=1).min()) > 0.9999
    assert float((by_opencv * by_onnxruntime.roll(1, 0)).sum(dim=1).max()) < 0.999


class YuNet:
    """What OpenCV's detector says of an image of 320 x 160 px: two faces, the smaller one more certain."""

    def setInputSize(self, size):
        self.size = size

    def detect(self, image):
        assert image.shape[:2] == self.size[::-1] == (160, 320) and image.dtype == np.uint8
        faces_ = [[1, 2, 10, 10, *range(10), 0.99], [100, 50, 40, 40, *range(20, 30), 0.8]]
        return 1, np.array(faces_, np.float32) if image.any() else None


def test_the_largest_face_is_given_in_px_of_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *_: YuNet())
    (tmp_path / "yunet.onnx").touch()
    detector = FaceDetector(str(tmp_path / "yunet.onnx"))
    pixels = np.full((80, 160, 3), 9, np.uint8)
    assert detector.largest(pixels).tolist()[:4] == [50, 25, 20, 20]
    assert detector.landmarks(pixels).tolist() == [[10 + i, 10.5 + i] for i in range(5)]
    assert detector.landmarks(pixels * 0) is None


@pytest.mark.parametrize("given", ["no.onnx", "../org/no.onnx", "/nowhere/at/no.onnx"])
def test_a_missing_file_is_named_and_no_hub_is_asked(given, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("asks the hub"))
    with pytest.raises(FileNotFoundError, match=r"no file '.*no\.onnx'"):
        FaceRecognition(given)


def test_a_hub_that_cannot_be_reached_is_told_with_the_file_and_the_remedy(monkeypatch, tmp_path):
    def unreachable(*_):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"sface_2021dec.onnx of opencv/face_recognition_sface \(no network\).*pa"
    ):
        SFace(detector=Found())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: tmp_path / repository / file)
    assert weights_file("org/name/folder/x.onnx") == tmp_path / "org/name/folder/x.onnx"


@pytest.mark.parametrize(("module", "network"), [("onnxruntime", FaceRecognition), ("cv2", SFace)])
def test_a_package_that_is_missing_is_told_with_its_extra(module, network, pooling, monkeypatch):
    def absent(name):
        raise ImportError(name) if name == module else AssertionError(name)

    monkeypatch.setattr(onnx.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"not installed: pip install 'lit_multiip\[faces\]'"):
        network(pooling)


def test_files_and_options_that_do_not_fit_are_refused(pooling, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\0" * 100)
    for network in (FaceRecognition, SFace):
        with pytest.raises(ValueError, match=r"'.*broken\.onnx' is no ONNX network"):
            network(str(broken))
    for options in ({"side": 64}, {"colours": "hsv"}, {"std": (0, 1, 1)}, {"crop": (0.5, 0.5, 0)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            FaceRecognition(pooling, **options)


def test_a_config_names_networks_and_detector(pooling, monkeypatch):
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *_: YuNet())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ScoreTest, "score")
    detector = {"class_path": "lit_multiip.evaluation.faces.FaceDetector", "init_args": {"path": pooling}}
    settings = [
        ("FaceRecognition", {"path": pooling, "crop": [0.5, 0.48, 0.448], "std": [1, 1, 1], "name": "mine"}),
        ("SFace", {"path": pooling, "detector": detector}),
    ]
    classes = [{"class_path": f"lit_multiip.evaluation.faces.{name}", "init_args": args} for name, args in settings]
    config = parser.parse_object({"score": {"extractors": classes}})
    first, second = parser.instantiate_classes(config).score.extractors
    assert (first.name, first.network.crop, second.name) == ("mine", LFW_CROP, "sface")
    assert isinstance(second.detector, FaceDetector)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models/mobilefacenet.onnx").is_file(), reason="needs ../shared/models")
def test_faces_of_one_person_are_told_from_those_of_others():
    """Prints ROC AUC over all pairs, and rank-1 of each photo against all other photos; run with -s."""
    people = sorted(folder for folder in (SHARED / "lfw-deepfunneled").iterdir() if folder.is_dir())
    files = [(i, file) for i, folder in enumerate(people) for file in sorted(folder.glob("*.jpg"))]
    extractor = FaceRecognition(str(SHARED / "models/mobilefacenet.onnx"), crop=LFW_CROP)
    pixels = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for _, file in files]
    embeddings = torch.cat(
        [extractor.extract(torch.stack(pixels[i : i + 32])).embedding for i in range(0, len(pixels), 32)]
    )
    cosines = (embeddings.double() @ embeddings.double().T).numpy()
    who = np.array([person for person, _ in files])
    same = who[:, None] == who
    pairs = np.triu_indices(len(who), 1)
    auc = roc_auc_score(same[pairs], cosines[pairs])
    np.fill_diagonal(cosines, -1)
    searched = same.sum(axis=1) > 1
    rank_1 = same[np.arange(len(who)), cosines.argmax(axis=1)][searched].mean()
    own, others = cosines[pairs][same[pairs]], cosines[pairs][~same[pairs]]
    print(
        f"\n{len(who)} photos of {len(people)} people: ROC AUC {auc:.4f} over {len(own)} pairs of one person and "
        f"{len(others)} of two (mean cosine {own.mean():.3f} and {others.mean():.3f}); rank-1 {rank_1:.4f} of "
        f"{searched.sum()} photos"
    )
    assert auc > 0.98 and rank_1 > 0.95
