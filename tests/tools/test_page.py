"""The page, over loopback: pictures, what stays apart, tuning, files, and what it refuses in a sentence."""

import io
import re
import shutil
import socket
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from one_person import write_person
from PIL import Image

from lit_multiip.files import LitMultiIPError
from lit_multiip.tools.page import open_studio, read_backbone, serve, workspace

pytest.importorskip("gradio", reason="the page needs the extra `page`")
import httpx
from gradio_client import Client, handle_file

from lit_multiip.tools import page_visits
from lit_multiip.tools.page_session import Session

PROMPT = "a person"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return [sorted(write_person(folder / name, 6, number).glob("*.png")) for number, name in enumerate(("ann", "bob"))]


@pytest.fixture(scope="module")
def served(tiny_backbone, tmp_path_factory):
    """The address of a page, and what all its visitors share."""
    score = tmp_path_factory.mktemp("score") / "score.yaml"
    score.write_text(yaml.safe_dump({"score": {"extractors": [{"class_path": "scoring.Thumbnail"}]}}))
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free, workspace() as folder:
        patch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")  # seconds after which a visitor who left is missed
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        studio = open_studio(folder, backbone=str(tiny_backbone), method="MaxPool", score=str(score))
        with serve(studio, port=port) as url:
            yield url, studio
    assert not folder.exists()


@pytest.fixture
def visit(served):
    """Makes visitors, who leave after the test."""
    clients = []

    def come(files=()):
        clients.append(Client(served[0], verbose=False))
        if files:
            clients[-1].added = add(clients[-1], files)
        return clients[-1]

    yield come
    for client in clients:
        client.close()


def add(client, files):
    return client.predict([handle_file(str(file)) for file in files], api_name="/add_photos")


def draw(
    client, names, held_out="none", prompt=PROMPT, seeds="0", scale=1.0, guidance=3.0, weights="as loaded", table=()
):
    rows = {"headers": ["Photo", "Weight"], "data": [list(row) for row in table]}
    choices = (list(names), held_out, prompt, seeds, scale, guidance, 2, 0.0, 1.0, weights, rows, 0.25)
    return client.predict(*choices, api_name="/draw")


def add_further(client, kind, files):
    return client.predict([handle_file(str(file)) for file in files], api_name=f"/add_{kind}")[1]


def tune(client, names, steps, call="predict"):
    return getattr(client, call)(list(names), "none", steps, PROMPT, "0", 1.0, 3.0, 2, 0.0, 1.0, api_name="/tune")


def names_of(files):
    return [file.name for file in files]


def fetch(url, part):
    """The files that a part of the page shows."""
    found = [httpx.get(f"{url}{path}", timeout=30) for path in re.findall(r'<img src="([^"]+)"', part)]
    assert all(answer.status_code == 200 for answer in found)
    return [np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(int) for answer in found]


def test_a_picture_is_drawn_over_loopback_as_the_api_draws_it(served, visit, photos):
    url, studio = served
    client = visit(photos[0])
    _, cards, use, held_out, table = client.added
    assert {*map(tuple, table["data"])} == {(name, 1) for name in names_of(photos[0])}
    assert len(fetch(url, cards)) == 6 and cards.count('class="good"') == 6
    assert len(use["value"]) == 5 and held_out["value"] in names_of(photos[0]) and held_out["value"] not in use["value"]
    pictures, shares = draw(client, use["value"], held_out["value"], seeds="3, 4")
    shown = fetch(url, pictures)  # each picture, and the nearest photo beside it
    kept = [file for file in photos[0] if file.name in use["value"]]
    own = studio.base.with_photos(kept)(PROMPT, seeds=[3, 4], guidance_scale=3.0, steps=2)
    assert [int(np.abs(a - np.asarray(b).astype(int)).max()) for a, b in zip(shown[::2], own, strict=True)] == [0, 0]
    for words in ("identity to the photos", "identity to held-out photos", "nearest photo"):
        assert pictures.count(f"<span>{words}</span>") >= 2
    percent = [int(number) for number in re.findall(r'class="number">(\d+) %', shares)]
    assert len(percent) == 5 and 95 <= sum(percent) <= 105


def test_photos_to_draw_away_from_and_a_second_person_act_as_in_the_api_until_they_are_removed(served, visit, photos):
    url, studio = served
    client, names = visit(photos[0]), names_of(photos[0])

    def picture():
        return fetch(url, draw(client, names)[0])[0]

    def differs(**options):
        [image] = studio.base.with_photos(photos[0])(PROMPT, guidance_scale=3.0, steps=2, **options)
        return int(np.abs(picture() - np.asarray(image).astype(int)).max())

    plain = picture()
    assert len(fetch(url, add_further(client, "negatives", photos[1][:2]))) == 2
    assert differs(negatives=photos[1][:2]) == 0 and (picture() != plain).any()
    with pytest.raises(Exception, match="negative photos act through guidance"):
        draw(client, names, guidance=1.0)
    assert client.predict(api_name="/remove_negatives") == "" and (picture() == plain).all()
    add_further(client, "beside", photos[1])
    right = np.arange(32) >= 8
    masks = [Image.fromarray(np.tile(side, (32, 1))) for side in (~right, right)]
    assert differs(beside=studio.base.with_photos(photos[1], "bob"), masks=masks) == 0 and (picture() != plain).any()
    cleared = client.predict(api_name="/clear")
    assert cleared[0] == cleared[4] == cleared[5] == ""
    assert not [file for folder in studio.folder.iterdir() for file in (folder / "beside").glob("*") if folder.is_dir()]
    add(client, photos[0])
    assert (picture() == plain).all()


def test_weights_act_as_in_the_api_and_what_is_no_weight_is_refused(served, visit, photos, tiny_backbone, tmp_path):
    session = Session(open_studio(tmp_path, backbone=str(tiny_backbone), method="AvgPool"), "weights")
    session.add([shutil.copy(file, tmp_path) for file in photos[0]])
    me, out = session.personalizer(list(session.photos), None, tuned=False)
    names = [photo.name for photo in me.person.photos]
    assert session.acting(me, [[name, 1] for name in names], 0.5) == {}
    acting = session.acting(me, [[names[1], "3"], [names[4], 0]], 0.5)
    assert acting == {"weights": [1, 3, 1, 1, 0, 1]}
    [drawn] = session.draw(me, out, PROMPT, [0], {"steps": 2}, lambda done, of: None, acting)
    assert (np.asarray(Image.open(drawn.file)) == np.asarray(me(PROMPT, steps=2, **acting)[0])).all()
    (_, shares), (_, alike) = (session.shares(me, me.choose_photos(**more)[0]) for more in (acting, {}))
    assert shares.keys() == {*names} - {names[4]} and alike.keys() == {*names}
    assert sum(shares.values()) == pytest.approx(1) and shares[names[1]] > 1.5 * alike[names[1]]
    for table, words in (
        ([[names[0], "much"]], f"the weight of '{names[0]}' is 'much': give a number of at least 0"),
        ([[names[0], float("nan")]], "a photo's weight is nan: give a number"),
        ([[names[0], -1]], "a photo's weight is -1.0: give a number"),
        ([[name, 0] for name in names], "all weights of .* are 0: give one photo"),
        ([["x.jpg", 2]], "there is no photo 'x.jpg' to weigh"),
    ):
        with pytest.raises(LitMultiIPError, match=words):
            me.choose_photos(**session.acting(me, table, 0.5))
    client = visit(photos[0])
    with pytest.raises(Exception, match="MaxPool gives photos no weights"):
        draw(client, names, table=[[names[0], 2]])


def test_two_visitors_do_not_see_each_others_photos_and_what_is_left_is_deleted(served, visit, photos, monkeypatch):
    ann, bob = visit(photos[0]), visit(photos[1])
    assert all(name not in str(bob.added) for name in names_of(photos[0]))
    with pytest.raises(Exception, match="is not in the list of choices"):
        draw(bob, names_of(photos[0]))
    with pytest.raises(Exception, match="there are no photos: add some"):
        draw(visit(), [])
    folders = {folder for folder in served[1].folder.iterdir() if (folder / "photos").is_dir()}
    assert len(folders) >= 2 and not list(served[1].folder.glob("*/*_0000.png"))  # none is left where it arrived
    monkeypatch.setattr(page_visits, "KEEP", 0)
    ann.close()
    path = re.findall(r'src="gradio_api/file=([^"]+)"', ann.added[1])[0]
    until = time.monotonic() + 60
    while Path(path).exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(path).exists()
    assert httpx.get(f"{served[0]}gradio_api/file={path}").status_code in (403, 404)
    assert draw(bob, names_of(photos[1]))[0].count("<img") == 2  # features are made again


def test_tuning_is_stopped_and_a_second_one_is_refused_and_the_files_come_as_a_zip(served, visit, photos):
    ann, bob = visit(photos[0]), visit(photos[1])
    with pytest.raises(Exception, match="nothing is tuned yet"):
        draw(ann, names_of(photos[0]), weights="tuned")
    job = tune(ann, names_of(photos[0]), 2000, "submit")
    until = time.monotonic() + 60
    while not (refused := served[1].base.is_tuning) and time.monotonic() < until:
        time.sleep(0.05)
    assert refused
    with pytest.raises(Exception, match="another tuning is going on"):
        tune(bob, names_of(photos[1]), 1)
    ann.predict(api_name="/stop")
    result, weights = job.result(timeout=120)
    assert weights == "tuned" and "<h4>Before</h4>" in result and "<h4>After</h4>" in result
    before, _, after, _ = fetch(served[0], result)
    again = fetch(served[0], draw(ann, names_of(photos[0]), weights="tuned")[0])[0]
    assert (after == again).all() and before.shape == (32, 32, 3)
    file = ann.predict(names_of(photos[0]), "none", "tuned", "ann", api_name="/export")["value"]
    names = zipfile.ZipFile(file).namelist()
    assert {"README.md", "lit_multiip.json", "ip-adapter_multiip.safetensors", "embeds/ann.safetensors"} <= {*names}
    assert not any(name.endswith((".png", ".jpg")) for name in names)


def write_huge(path):
    """A PNG file that says of itself that it has 30000 x 30000 px."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = np.array([30000, 30000], ">u4").tobytes()
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)
    return path


def test_what_cannot_be_is_said_in_a_sentence_and_nothing_is_lost(served, visit, photos, tmp_path):
    client = visit(photos[0][:1])
    (tmp_path / "notes.txt").write_text("remember the milk")
    (tmp_path / "false.jpg").write_text("no picture")
    cards = add(client, [tmp_path / "notes.txt", tmp_path / "false.jpg", write_huge(tmp_path / "huge.png")])[1]
    assert "not a JPEG, PNG, WebP or BMP picture" in cards and "decompression bomb" in cards and "notes" not in cards
    [name] = names_of(photos[0][:1])

    def refused(words, call):
        with pytest.raises(Exception, match=words) as error:
            call()
        assert "Traceback" not in str(error.value) and str(served[1].folder) not in str(error.value)

    refused("takes 5, one of them held out", lambda: tune(client, [name], 1))
    refused("no photo is left", lambda: draw(client, []))
    refused("no photo is left", lambda: draw(client, [name], name))
    refused("tokens, and 16 are read: shorten it", lambda: draw(client, [name], prompt="word " * 10_000))
    refused("the prompt is empty", lambda: draw(client, [name], prompt=" "))
    refused("are no seeds", lambda: draw(client, [name], seeds="one"))
    refused("give at most 16", lambda: draw(client, [name], seeds="1 " * 17))
    refused("less than minimum", lambda: draw(client, [name], scale=-1))
    refused("cannot name files", lambda: client.predict([name], "none", "as loaded", "../x", api_name="/export"))
    refused("is not in the list of choices", lambda: draw(client, ["false.jpg"]))
    session = Session(served[1], "loopback-carries-no-nan")
    session.add_example()
    me, out = session.personalizer(list(session.photos), None, tuned=False)
    with pytest.raises(LitMultiIPError, match="is not finite"):
        session.draw(me, out, PROMPT, [0], {"ip_scale": float("nan")}, lambda done, of: None)
    assert draw(client, [name])[0].count("<img") == 2


def test_what_cannot_be_served_is_refused(tmp_path, tiny_backbone):
    for options, words in (
        ({"run": "runs/x", "method": "AvgPool"}, "brings its own method"),
        ({"score": str(tmp_path / "none.yaml")}, "cannot be read"),
        ({"backbone": str(tmp_path / "none.yaml")}, "cannot be read"),
    ):
        with pytest.raises(LitMultiIPError, match=words):
            open_studio(tmp_path, **options)
    backbone, options = read_backbone(str(Path(__file__).parents[2] / "configs" / "on" / "sd15.yaml"))
    assert backbone.published_adapter.startswith("h94/") and options["sampling"].steps == 20
    assert threading.active_count() < 60
