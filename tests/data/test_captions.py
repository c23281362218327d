import csv
import json
import unicodedata

import pytest
from folders import save

from lit_multiip.data import DataError, Folder


def prompts(source: Folder) -> dict[str, str]:
    return {photo.name: photo.prompt for person in source.people() for photo in person.photos}


def test_a_prompt_comes_from_txt_else_metadata_else_template(photos):
    (photos / "Bo" / "Bo_1.txt").write_text("\ufeff a photo of a person\n at sea \n", "utf-8")
    (photos / "Bo" / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"Bo_{i}.jpg", "prompt": f"own {i}"}) for i in (1, 2)) + "\n"
    )
    with (photos / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["file_name", "text"],
                ["Bo/Bo_2.jpg", "top 2"],
                ["Bo\\Bo_3.jpg", "in red, at sea"],
                ["./Cy/Cy_1.jpg", "c"],
            ]
        )
    found = prompts(Folder(str(photos), "a picture of a person"))
    assert [found[f"Bo_{i}.jpg"] for i in (1, 2, 3)] == ["a photo of a person at sea", "own 2", "in red, at sea"]
    assert found["Cy_1.jpg"] == "c"
    assert found["Cy_2.jpg"] == "a picture of a person"


def test_only_a_template_that_says_so_holds_the_name(photos):
    assert not any("Ann" in prompt for prompt in prompts(Folder(str(photos))).values())
    assert prompts(Folder(str(photos), "a photo of {name}"))["Ann_Lee_1.jpg"] == "a photo of Ann Lee"
    for template in ("", "a photo of {nmae}", "a {"):
        with pytest.raises(DataError, match="template"):
            Folder("unread", template)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Bo/Bo_9.txt", "a photo", r"Bo_9\.txt has no photo"),
        ("Bo/Bo_1.txt", " \n", r"Bo_1\.txt is empty"),
        ("Bo/Bo_1.txt", b"\xff\xfe\x00", r"Bo_1\.txt cannot be read"),
        ("metadata.csv", "file_name,text\nBo/Bo_9.jpg,x\n", r"line 2.*'Bo/Bo_9\.jpg'.*no such photo"),
        ("metadata.csv", "file_name,text\n../Bo/Bo_1.jpg,x\n", r"'\.\./Bo/Bo_1\.jpg'.*outside"),
        ("metadata.csv", "file_name,text\n/etc/Bo_1.jpg,x\n", r"'/etc/Bo_1\.jpg'.*outside"),
        ("metadata.csv", "file_name,text\nBo\\..\\..\\x.jpg,x\n", "outside"),
        ("Bo/metadata.csv", "file_name,text\nBo_1.jpg,in red, at sea\n", "line 2.*quotes"),
        ("Bo/metadata.csv", "file_name,text\nBo_1.jpg\n", "line 2.*must give"),
        ("Bo/metadata.csv", "name,text\nBo_1.jpg,x\n", "must give file_name"),
        ("Bo/metadata.csv", "file_name,text\nBo_1.jpg,x\nBo_1.jpg,y\n", "line 3.*already"),
        ("Bo/metadata.jsonl", '{"file_name": "Bo_1.jpg", "text": 3}', "line 1.*must give"),
        ("Bo/metadata.jsonl", '{"file_name": "Bo_1.jpg", "text": "a", "prompt": "b"}', "one prompt"),
        ("Bo/metadata.jsonl", '\n{"file_name": ', "line 2.*not JSON"),
        ("Bo/metadata.jsonl", "[]", "not a JSON object"),
    ],
)
def test_a_caption_at_fault_is_named(photos, file, text, message):
    (photos / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        Folder(str(photos)).people()


def test_accents_match_however_they_are_composed(tmp_path):
    composed, split = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    save(tmp_path / split / f"{split}.jpg")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{composed}/{composed}.jpg,hello\n", "utf-8")
    (person,) = Folder(str(tmp_path)).people()
    assert (person.name, person.photos[0].prompt) == (composed, "hello")
    save(tmp_path / composed / "1.jpg")
    with pytest.raises(DataError, match="several people are called"):
        Folder(str(tmp_path)).people()
