"""commvlm data: what is wrong is found, named and drawn; prepared stores train alike; downloads are checked."""

import functools
import hashlib
import http.server
import io
import json
import re
import shutil
import threading
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commvlm.cli import main
from commvlm.data import downloads
from commvlm.data.check import SourceCheck, check_examples, look_at_images
from commvlm.data.downloads import ITEMS, Item, fetch, item_named
from commvlm.data.example import Example, Turn
from commvlm.data.store import Stored
from commvlm.train.checking import check_recipe, prepare_recipe
from commvlm.train.recipe import load_recipe
from commvlm.train.run import train
from commvlm.train.sources import examples_of, named_examples, stage_mixture, store_of, training_examples


def line(image, box=(2, 2, 20, 20), **change):
    return {"img_path": image, "expression": "the dot", "bbox": list(box), "height": 48, "width": 64} | change


@pytest.fixture
def root(tmp_path):
    """Twelve images, one each of what users have, and lines about them."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for n in range(6):
        noise.save(images / f"good{n}.png")
    noise.save(images / "whole.jpg", quality=95)
    content = (images / "whole.jpg").read_bytes()
    (images / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (images / "text.jpg").write_bytes(b"<html>404</html>")
    noise.convert("CMYK").save(images / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65536, (48, 64), dtype=np.uint16)).save(images / "deep.png")
    noise.save(images / "moving.gif", save_all=True, append_images=[noise.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(images / "turned.jpg", exif=exif)
    noise.resize((32, 24)).save(images / "small.png")
    header = io.BytesIO()
    Image.new("1", (1, 1)).save(header, format="PNG")
    bomb = bytearray(header.getvalue())
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (images / "bomb.png").write_bytes(bomb)
    rows = [
        *(line(f"good{n}.png") for n in range(6)),
        line("truncated.jpg"), line("text.jpg"), line("cmyk.jpg"), line("deep.png"), line("moving.gif"),
        line("turned.jpg"), line("small.png"), line("bomb.png"), line("gone.png"),
        line("good0.png", (-30, 2, 20, 20)), line("good1.png", (70, 2, 90, 20)), line("good2.png", (0, 0, 64.6, 48.4)),
        line("good3.png", (20, 2, 2, 20)), line("good4.png", (float("nan"), 2, 2, 20)), line("../secret.png"),
        line("good5.png", expression="{} and {content}"), line("good5.png", expression="an <image> in it"),
    ]  # fmt: skip
    (tmp_path / "rec.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\r\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(line("good5.png")) + "\n")
    return tmp_path


def sources(name="rec", file="rec.jsonl", **more):
    return {"name": name, "format": "refer-jsonl", "images": "images", "files": {"annotations": file}, **more}


def options(root, *more, out=()):
    return [
        "--data.root", str(root), "--data.group", "1", "--data.sources", json.dumps([sources()]),
        "--evaluate.sources", json.dumps([sources("asked", "test.jsonl")]), *more,
    ]  # fmt: skip


BAD = {"left out": 4, "missing": 1, "broken": 4, "other size": 1, "outside": 1, "nowhere": 1, "empty": 0, "too long": 0,
       "in a test": 2}  # fmt: skip


def test_check_finds_everything(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "check", "micro", *options(root), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    said = json.loads((out / "check.json").read_text())
    train_check, asked = said["sources"]
    assert {name: problem["count"] for name, problem in train_check["problems"].items()} == BAD
    assert (train_check["examples"], train_check["images"], train_check["boxes"]) == (19, 15, 19)
    assert sum(problem["count"] for problem in asked["problems"].values()) == 0
    broken = " ".join(train_check["problems"]["broken"]["places"])
    assert [name for name in ("truncated.jpg", "text.jpg", "deep.png", "bomb.png") if name in broken] == [
        "truncated.jpg", "text.jpg", "deep.png", "bomb.png",
    ]  # fmt: skip
    for word in (
        "rec.jsonl:19",
        "gone.png",
        "64 x 48 said",
        "(-30, 2, 20, 20) in 64 x 48",
        "good5.png is asked by asked",
    ):
        assert word in text
    page = (out / "check.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5  # four of the source that is trained on, one of the other
    assert "http://" not in page
    assert "rec.jsonl:19" in page


def test_a_source_that_cannot_be_read_does_not_hide_the_others(root, tmp_path, capsys):
    both = json.dumps([sources("lost", "lost.jsonl"), sources()])
    command = [
        "data",
        "check",
        "micro",
        *options(root),
        "--data.sources",
        both,
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(command) == 2
    lost, found, _ = json.loads(capsys.readouterr().out)
    assert "there is no such annotation file" in lost["error"]
    assert lost["files"]["annotations"][1] is None
    assert found["examples"] == 19


def test_check_tells_a_wrong_convention(tmp_path):
    """Boxes of x, y, width, height, read as corners."""
    rng = np.random.default_rng(0)
    image = tmp_path / "a.png"
    Image.new("RGB", (640, 480)).save(image)
    corners = []
    for _ in range(60):
        w, h = rng.uniform(20, 400, 2)
        x, y = rng.random(2) * (640 - w, 480 - h)
        corners.append((x, y, w, h))
    made = [
        Example(str(n), "rec", image, (Turn("x", "<boxes>", answer_boxes=((box,),)),)) for n, box in enumerate(corners)
    ]
    check = SourceCheck("s", "train", "refer-jsonl", {})
    check_examples(check, made, look_at_images([image]))
    assert "look like xywh-pixels" in check.convention
    right = [(x, y, x + w, y + h) for x, y, w, h in corners]
    fine = [replace(e, turns=(Turn("x", "<boxes>", answer_boxes=((b,),)),)) for e, b in zip(made, right, strict=True)]
    check = SourceCheck("s", "train", "refer-jsonl", {})
    check_examples(check, fine, look_at_images([image]))
    assert check.convention is None
    assert check.bad == 0


def test_check_tells_boxes_that_are_read_as_text():
    """As sharegpt reads them where nothing says what their numbers mean."""
    for answer, told in {
        "<box>[[100, 200,400,700]]</box>": True, "at (1,2),(3,4)": True, "[0.1,0.2,0.3,0.4]": True, "in [1, 2]": False,
        "(a), (b)": False, "<boxes>": False,
    }.items():  # fmt: skip
        boxes = (((1.0, 2.0, 3.0, 4.0),),) if answer == "<boxes>" else ()
        check = SourceCheck("s", "train", "sharegpt", {})
        check_examples(check, [Example("1", "dialogue", None, (Turn("where?", answer, answer_boxes=boxes),))], {})
        assert bool(check.convention) == told, answer
        assert check.bad == 0


def test_long_and_empty_answers(root, tmp_path, capsys):
    rows = [{"id": 1, "conversations": [{"from": "human", "value": "a " * 400}, {"from": "gpt", "value": "b"}]}]
    (root / "talk.json").write_text(json.dumps(rows))
    asked = {"data_subtype": "x", "questions": [{"question_id": 7, "image_id": 1, "question": "What?"}]}
    (root / "unanswered.json").write_text(json.dumps(asked))
    talk = {"name": "talk", "format": "llava", "images": "images", "files": {"conversations": "talk.json"}}
    test = {"name": "test", "format": "vqa", "images": "images", "files": {"questions": "unanswered.json"}}
    more = ["--data.sources", json.dumps([talk, test]), "--train.max_length", "300"]
    assert main(["data", "check", "micro", *options(root), *more, "--out", str(tmp_path / "out"), "--json"]) == 0
    talk, test, _ = (source["problems"] for source in json.loads(capsys.readouterr().out))
    assert test["empty"] == {"count": 1, "places": ["7"]}
    assert talk["too long"]["count"] == 1
    assert re.fullmatch(r"talk:0: \d+ tokens", talk["too long"]["places"][0])


def run_options(root, *more):
    stage = {"name": "one", "steps": 2, "batch": 16, "trains": {"project": 1e-3}}
    layers = ["--model.encoders.clip.layers", "[1]", "--model.encoders.dinov2.layers", "[1]"]
    return [*options(root), "--train.stages", json.dumps([stage]), "--train.attention", "sdpa", *layers, *more]


def test_training_refuses_bad_data_or_leaves_it_out(root, tmp_path, capsys):
    """Refuse: the first fault, before anything is trained. Skip: every fault is left out, counted, and the run ends."""
    refusing = load_recipe("micro", run_options(root))
    with pytest.raises(ValueError, match=r"source 'rec': rec\.jsonl:19: has bbox"):
        train(refusing, tmp_path / "refused")
    skipping = load_recipe("micro", run_options(root, "--data.faults", "skip"))
    train(skipping, tmp_path / "run")
    said = capsys.readouterr().err
    assert "source 'rec': 4 entries left out" in said
    rows = [json.loads(row) for row in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    assert rows
    assert json.loads((tmp_path / "run" / "run.json").read_text())["left_out"] == len({str(row) for row in rows})
    unusable = {"truncated.jpg", "text.jpg", "deep.png", "bomb.png", "gone.png", "small.png"}
    assert {Path(row["image"]).name for row in rows} <= unusable
    assert {Path(row["image"]).name for row in rows} & {"truncated.jpg", "bomb.png", "gone.png", "text.jpg"}
    train(skipping, tmp_path / "again")
    assert (tmp_path / "again" / "left_out.jsonl").read_bytes() == (tmp_path / "run" / "left_out.jsonl").read_bytes()


def test_data_that_is_all_broken_is_told(root, tmp_path):
    shutil.rmtree(root / "images")
    (root / "images").mkdir()
    recipe = load_recipe("micro", run_options(root, "--data.faults", "skip"))
    with pytest.raises(ValueError, match=r"32 groups in a row cannot be used; the last: .*no such image file"):
        train(recipe, tmp_path / "run")


def test_prepared_sources_are_what_the_files_are(world, small, tmp_path, capsys):
    """The same examples, so the same order and the same run; prepared again, nothing is done."""
    root = shutil.copytree(world, tmp_path / "world")
    recipe = small("--data.root", str(root))
    plain = named_examples(recipe.data.sources, root)
    for _ in range(2):
        assert main(["data", "prepare", "micro", "--data.root", str(root)]) == 0
    assert "rec: " in capsys.readouterr().out
    prepared = named_examples(recipe.data.sources, root)
    assert all(type(examples).__name__ == "Stored" for examples in prepared.values())
    assert {name: list(examples) for name, examples in prepared.items()} == plain
    stage = recipe.train.stages[0]
    drawn = [stage_mixture(stage, recipe.data, examples, seed=1) for examples in (plain, prepared)]
    assert [drawn[0][k] for k in range(12)] == [drawn[1][k] for k in range(12)]
    changed = root / "train" / "rec.jsonl"
    changed.write_text("\n".join(changed.read_text().splitlines()[:-1]))
    assert len(named_examples(recipe.data.sources[:1], root)["rec"]) == len(plain["rec"]) - 1
    assert "its files changed since" in capsys.readouterr().err


def test_prepare_keeps_what_is_done(root, capsys):
    command = ["data", "prepare", "micro", *options(root)]
    assert main(command) == 0
    assert "rec: 19 examples, 4 entries left out in" in capsys.readouterr().out
    recipe = load_recipe("micro", options(root))
    folder = store_of(recipe.data.sources[0], root)
    stamp = (folder / "meta.json").stat().st_mtime_ns
    assert main([*command, "--sources", "rec"]) == 0
    assert (folder / "meta.json").stat().st_mtime_ns == stamp
    with pytest.raises(
        ValueError, match=r"source 'rec': rec\.jsonl:19.*4 such entries; data\.faults skip leaves them out"
    ):
        named_examples(recipe.data.sources, root)
    assert len(named_examples(recipe.data.sources, root, faults="skip")["rec"]) == 19
    assert main([*command, "--sources", "recc"]) == 2
    assert "the recipe has no source 'recc'; it has rec" in capsys.readouterr().err


def test_check_tells_held_out_images_from_those_of_a_test(root, tmp_path):
    (root / "rec.jsonl").write_text("".join(json.dumps(line(f"good{n % 6}.png")) + "\n" for n in range(12)))
    (root / "held.jsonl").write_text("".join(json.dumps(line(name)) + "\n" for name in ("good4.png", "good5.png")))
    for held, counted in (([], (0, 2)), ([sources("held", "held.jsonl")], (4, 0))):
        recipe = load_recipe("micro", options(root, "--data.held_out", json.dumps(held)))
        (rec, *_) = check_recipe(recipe)
        assert (rec.check.held, rec.check.problems["in a test"].count) == counted


def test_many_examples_that_are_not_prepared_are_told(root, monkeypatch, capsys):
    (root / "rec.jsonl").write_text("".join(json.dumps(line(f"good{n}.png")) + "\n" for n in range(6)))
    recipe = load_recipe("micro", options(root))
    monkeypatch.setattr("commvlm.train.sources.MANY", 5)
    named_examples(recipe.data.sources, root)
    assert "source 'rec': 6 examples are held in memory by every process" in capsys.readouterr().err
    prepare_recipe(recipe)
    named_examples(recipe.data.sources, root)
    assert "held in memory" not in capsys.readouterr().err


def test_a_store_that_is_damaged_or_moved(root, tmp_path):
    (root / "rec.jsonl").write_text("".join(json.dumps(line(f"good{n}.png")) + "\n" for n in range(6)))
    ((source, _),) = prepare_recipe(load_recipe("micro", options(root)), ["rec"])
    folder = store_of(source, root)
    moved = shutil.copytree(root, tmp_path / "moved", copy_function=shutil.copy2)
    assert isinstance(examples_of(source, moved), Stored)
    content = (folder / "examples.arrow").read_bytes()
    (folder / "examples.arrow").write_bytes(content[: len(content) // 2])
    assert not isinstance(examples_of(source, root), Stored)
    prepare_recipe(load_recipe("micro", options(root)), ["rec"])
    assert isinstance(examples_of(source, root), Stored)
    assert len(examples_of(source, root)) == 6


@pytest.mark.parametrize("prepared", [False, True])
def test_held_out_images_are_not_trained_on(root, prepared, capsys):
    (root / "rec.jsonl").write_text("".join(json.dumps(line(f"good{n % 6}.png")) + "\n" for n in range(12)))
    held = ["--data.held_out", json.dumps([sources("refcoco-val", "test.jsonl")])]
    recipe = load_recipe("micro", options(root, *held))
    if prepared:
        assert main(["data", "prepare", "micro", *options(root, *held)]) == 0
    examples = training_examples(recipe.data)["rec"]
    assert "source 'rec': 2 examples about held-out images left out" in capsys.readouterr().err
    assert sorted({e.image.name for e in examples}) == [f"good{n}.png" for n in range(5)]
    stage = replace(recipe.train.stages[0], steps=20, batch=1, weights={})
    for group in (1, 2):
        mixture = stage_mixture(stage, replace(recipe.data, group=group), {"rec": examples}, seed=0)
        assert "good5.png" not in {e.image.name for k in range(20) for e in mixture[k]}


def test_stages_name_their_mix(world, small):
    mixes = {"most": {"weighted": [{"source": "rec", "weight": 3}, {"concat": ["vqa", "pope"], "weight": 1}]}}
    stage = {"name": "one", "steps": 64, "batch": 16, "trains": {"project": 1e-3}, "mix": "most"}
    given = ["--data.mixes", json.dumps(mixes), "--data.group", "1"]
    recipe = small(*given, stages=[stage])
    examples = named_examples(recipe.data.sources, world)
    mixture = stage_mixture(recipe.train.stages[0], recipe.data, examples, seed=0)
    tasks = [mixture[k][0].task for k in range(1024)]
    assert tasks.count("rec") == 768
    assert set(tasks) == {"rec", "vqa", "pope"}
    for change, match in (
        ({"mix": "mots"}, "there is no mix 'mots'; did you mean 'most'"),
        ({"weights": {"rec": 1}}, "has both mix and weights"),
    ):
        with pytest.raises(ValueError, match=match):
            stage_mixture(replace(recipe.train.stages[0], **change), recipe.data, examples, seed=0)
    broken = replace(recipe.data, mixes={"most": {"concat": ["recc"]}})
    with pytest.raises(ValueError, match=r"data\.mixes\.most\.concat\[0\]: there is no source 'recc'"):
        stage_mixture(recipe.train.stages[0], broken, examples, seed=0)


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges, as the real hosts do, and breaks off where it is told to."""

    broken = 0

    def do_GET(self):
        content = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        begun = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if begun else 200)
        self.send_header("Content-Length", str(len(content) - begun))
        self.end_headers()
        end = len(content) // 2 if Handler.broken else len(content)
        Handler.broken = max(0, Handler.broken - 1)
        self.wfile.write(content[begun:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def item(server, name, content, **more):
    folder, url = server
    (folder / name).write_bytes(content)
    return Item("thing", f"{url}/{name}", "things", "MIT", "vqa", **more)


def test_downloads_are_checked_and_unpacked(server, tmp_path):
    content = zipped({"a/b.json": "[1]", "c.txt": "c"})
    thing = item(server, "t.zip", content, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    came = []
    folder = fetch(thing, tmp_path / "data", lambda new, size: came.append((new, size)))
    assert (folder / "a" / "b.json").read_text() == "[1]"
    assert sum(new for new, _ in came) == len(content)
    (server[0] / "t.zip").unlink()
    assert fetch(thing, tmp_path / "data") == folder  # what is there stays


def test_an_interrupted_download_goes_on(server, tmp_path):
    content = bytes(range(256)) * 5000
    thing = item(server, "t.bin", content, sha256=hashlib.sha256(content).hexdigest())
    Handler.broken = 1
    with pytest.raises(ValueError, match=r"thing: .*(came, then no more|cannot be reached).*the same command goes on"):
        fetch(thing, tmp_path / "data")
    part = tmp_path / "data" / "things" / "t.bin.part"
    assert part.stat().st_size == len(content) // 2
    assert (fetch(thing, tmp_path / "data") / "t.bin").read_bytes() == content
    assert not part.exists()


def test_wrong_downloads_are_removed(server, tmp_path):
    thing = item(server, "t.bin", b"hello", sha256="0" * 64)
    with pytest.raises(ValueError, match=r"SHA-256 is 2cf24.*it must be 0000"):
        fetch(thing, tmp_path / "data")
    thing = item(server, "t.bin", b"hello", size=6)
    with pytest.raises(ValueError, match="5 bytes came, it has 6"):
        fetch(thing, tmp_path / "data")
    assert list((tmp_path / "data" / "things").iterdir()) == []


def test_first_hashes_are_kept(server, tmp_path):
    root = tmp_path / "data"
    thing = item(server, "t.bin", b"hello")
    fetch(thing, root)
    assert json.loads((root / downloads.CHECKSUMS).read_text()) == {"thing": hashlib.sha256(b"hello").hexdigest()}
    shutil.rmtree(root / "things")
    item(server, "t.bin", b"other")
    with pytest.raises(ValueError, match="it must be 2cf24"):
        fetch(thing, root)


@pytest.mark.parametrize("name", ["../out.txt", "{root}/absolute.txt", "a/../../out.txt"])
def test_an_archive_that_writes_elsewhere(server, tmp_path, name):
    thing = item(server, "t.zip", zipped({name.format(root=tmp_path): "x"}))
    with pytest.raises(ValueError, match="which lies outside"):
        fetch(thing, tmp_path / "data")
    assert not (tmp_path / "out.txt").exists()
    assert not (tmp_path / "data" / "out.txt").exists()
    assert not (tmp_path / "absolute.txt").exists()


def test_without_a_network(tmp_path, monkeypatch, capsys):
    offline = Item("thing", "http://127.0.0.1:9/t.zip", "things", "MIT", "vqa")
    monkeypatch.setattr(downloads, "ITEMS", (offline,))
    assert main(["data", "download", "thing", "--to", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "thing: http://127.0.0.1:9/t.zip cannot be reached" in error
    assert len(error.strip().splitlines()) == 1


def test_the_list_of_downloads(tmp_path, capsys):
    assert main(["data", "download"]) == 0
    text = capsys.readouterr().out
    for entry in ITEMS:
        assert entry.url in text
        assert entry.licence
    assert "13.51 GB  SHA-256 known" in text
    with pytest.raises(ValueError, match=r"mme has no direct link: get it from .* and put it in"):
        fetch(item_named("mme"), tmp_path)
    with pytest.raises(ValueError, match="there is no download 'cocoo'; downloads: coco-train2014"):
        item_named("cocoo")
    assert len({entry.name for entry in ITEMS}) == len(ITEMS)
    assert all(re.fullmatch(r"[0-9a-f]{64}", entry.sha256) for entry in ITEMS if entry.sha256)
