"""The command `photos check`: what is wrong with one person's photos, and which of them to take."""

from __future__ import annotations

from lit_multiip.backbone.dlib_faces import load_detector
from lit_multiip.data.people import read_person
from lit_multiip.evaluation import faces, vision  # noqa: F401  so that `--extractor` may call their classes by name
from lit_multiip.evaluation.critic import Resemblance
from lit_multiip.evaluation.extractors import Extractor
from lit_multiip.evaluation.photo_check import PhotoCheck, check_person
from lit_multiip.files import LitMultiIPError


def check(
    folder: str,
    extractor: Extractor | None = None,
    detector: str | None = None,
    same_person: float | None = None,
    side: int = 64,
    take: int = 9,
) -> None:
    """Say of every photo of one person what is wrong with it, and which to take, best first.

    Found are photos of somebody else, without a face or with several, copies, blur, too few pixels, and files that
    cannot be read. Nothing is deleted.

    Args:
        folder: with photos of one person.
        extractor: tells people apart; null is `Resemblance`, of drawn portraits. Of real people take a face network,
            such as `SFace`, or `FaceRecognition` with its `path`.
        detector: finds faces: `dlib`, or YuNet: its file or `org/repository/file.onnx` on the hub. Null counts no
            faces.
        same_person: cosine from which two photos show one person; null takes the extractor's own.
        side: px that a photo's shorter side should have: that of the backbone's images.
        take: how many photos to take.
    """
    if take < 1:
        raise LitMultiIPError(f"take={take}: give at least 1")
    person = read_person(folder)
    finder = None if detector is None else load_detector(detector)
    result = check_person(person, extractor or Resemblance(), finder, same_person, side)
    print(render(result, take))


def render(result: PhotoCheck, take: int) -> str:
    """Return what the command prints: a table in the order of merit, and what follows from it."""
    best = result.best(take)
    lines = [f"{result.person}: {len(result.photos)} photos, best first", "", result.table(take), ""]
    lines.append(f"take {len(best)}: {', '.join(photo.name for photo in best)}" if best else "no photo can be taken")
    left_out = [checked.photo.name for checked in result.photos if not checked.usable]
    if left_out:
        lines.append(f"leave out: {', '.join(left_out)}")
    if len(best) < take:
        lines.append(f"{take} photos are wanted: add {take - len(best)} of other clothes, light and expressions")
    return "\n".join(lines)


photos = {"check": check}  # the command's own commands
