"""Probes of REC files, and over real photos at the encoders' true shapes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from commvlm.cli import main
from commvlm.model.frozen import open_frozen
from commvlm.model.spec import EncoderSpec
from commvlm.probe.curves import Probe
from commvlm.probe.problem import Thing, truth_of
from commvlm.probe.refer import refer_problem, words_of


def refer_line(image: str, expression: str, box: Sequence[float]) -> str:
    return json.dumps({"img_path": image, "expression": expression, "bbox": list(box), "height": 40, "width": 60})


class TestRefer:
    def folder(self, tmp_path: Path, count: int = 12) -> Path:
        (tmp_path / "images").mkdir()
        lines = []
        for k in range(count):
            Image.new("RGB", (60, 40), (20 * k, 99, 99)).save(tmp_path / "images" / f"{k}.png")
            lines += [
                refer_line(f"{k}.png", "The red cup.", (0, 0, 20, 20)),
                refer_line(f"{k}.png", "a cup", (0, 0, 20, 20)),
            ]
            lines.append(refer_line(f"{k}.png", "blue star on the left", (30, 10, 60, 40)))
        (tmp_path / "lines.jsonl").write_text("\n".join(lines))
        return tmp_path

    def test_lines_become_objects_with_their_words(self, tmp_path):
        found = refer_problem(self.folder(tmp_path), train=100, test=100)
        assert (len(found.train), len(found.test), found.categories) == (9, 3, 0)
        assert set(found.words) == {"red", "cup", "blue", "star", "left"}
        first = found.train[0]
        assert [t.box for t in first.things] == [(0, 0, 20, 20), (30, 10, 60, 40)]
        assert first.things[0].asked == (("red", "cup"), ("cup",))
        assert first.open().size == (60, 40)
        assert words_of("The dog's 2nd  Ball, the ball") == ("dog", "s", "2nd", "ball")

    def test_questions_without_a_known_word_are_not_asked(self, tmp_path):
        folder = self.folder(tmp_path)
        with (folder / "lines.jsonl").open("a") as file:
            file.write("\n" + refer_line("0.png", "zebra", (0, 0, 20, 20)))
        found = refer_problem(folder, train=100, test=100)
        asked = [words for p in (*found.train, *found.test) for t in p.things for words in t.asked]
        assert "zebra" not in found.words
        assert () not in asked
        assert len(asked) == 36

    def test_refer_pickles_have_categories_and_splits(self, tmp_path):
        self.folder(tmp_path)
        (tmp_path / "lines.jsonl").unlink()
        refs = [
            {"ref_id": k, "ann_id": k, "image_id": k, "category_id": 18 + k % 2, "split": "train" if k < 8 else "val",
             "file_name": "x", "sent_ids": [k], "sentences": [{"sent_id": k, "sent": "red cup", "raw": "", "tokens": []}]}
            for k in range(12)
        ]  # fmt: skip
        (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs))
        images = [{"id": k, "file_name": f"{k}.png", "width": 60, "height": 40} for k in range(12)]
        boxes = [{"id": k, "image_id": k, "bbox": [1, 2, 10, 20]} for k in range(12)]
        (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes}))
        found = refer_problem(tmp_path, train=6, test=3)
        assert (len(found.train), len(found.test)) == (6, 3)
        assert found.words == ("#18", "#19", "cup", "red")
        assert found.categories == 2
        assert found.train[1].things[0] == Thing((1, 2, 11, 22), ("#19", "red", "cup"), (("red", "cup"),))
        google = tmp_path / "refs(google).p"  # the archives have it too, and it comes first by name
        google.write_bytes(pickle.dumps([{**ref, "split": "val" if ref["ref_id"] < 8 else "train"} for ref in refs]))
        assert truth_of(found.words, found.train, (2, 3)).present[0].tolist() == [1, 0, 1, 1]
        boxes.append({"id": 99, "image_id": 0, "bbox": [30, 2, 10, 20], "category_id": 19})  # nobody speaks of it
        (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes}))
        seen = refer_problem(tmp_path, train=6, test=3)
        assert truth_of(seen.words, seen.train, (2, 3)).present[0].tolist() == [1, 1, 1, 1]
        assert [picture.things for picture in seen.train] == [picture.things for picture in found.train]
        again = refer_problem(tmp_path, train=6, test=3)
        assert [p.identity for p in (*again.train, *again.test)] == [p.identity for p in (*found.train, *found.test)]
        assert len(refer_problem(google, train=6, test=30).test) == 8

    def test_what_is_wrong_is_one_line(self, tmp_path, capsys):
        assert main(["probe", "clip", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 2
        assert "no such folder or file" in capsys.readouterr().err
        assert main(["probe", "clip", "--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
        assert "no refs(*).p and no *.jsonl" in capsys.readouterr().err
        assert main(["probe", "clp", "--out", str(tmp_path / "o")]) == 2
        assert "clp" in capsys.readouterr().err
        assert main(["probe", "clip", "--tasks", "reg", "--out", str(tmp_path / "o")]) == 2
        assert "unknown task 'reg'; did you mean 'region'?" in capsys.readouterr().err


SAMPLES = Path(__file__).resolve().parents[1].parent / "shared" / "samples" / "coco_images"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checkpoint", ["openai/clip-vit-large-patch14", "facebook/dinov2-large"])
def test_true_shapes_over_photos(checkpoint, tmp_path, capsys):
    """ViT-L with random weights over photos with a refer-style file, at 224 pixels; the second call reads what is stored."""
    photos = sorted(SAMPLES.glob("*.[jp][pn]g")) if SAMPLES.is_dir() else []
    if not photos:
        pytest.skip("needs the folder of sample photos")
    (tmp_path / "images").mkdir()
    lines = []
    for k in range(6):
        picture = Image.open(photos[k % len(photos)]).convert("RGB").rotate(90 * (k // len(photos)))
        picture.save(tmp_path / "images" / f"{k}.png")
        for said, box in (("the left cat", (10, 50, 310, 470)), ("right cat", (340, 20, 630, 370))):
            entry = {"img_path": f"{k}.png", "expression": said, "bbox": box, "height": 480, "width": 640}
            lines.append(json.dumps(entry))
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    command = [
        "probe",
        checkpoint,
        "--weights",
        "random",
        "--image-size",
        "224",
        "--data",
        str(tmp_path),
        "--layers",
        "6,12,24",
    ]
    command += ["--seeds", "1", "--steps", "5", "--jobs", "1", "--batch", "2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    probe = Probe(tmp_path / "out")
    (name,) = probe.encoders()
    assert probe.sources[name]["grid"] == [16, 16]
    assert list(probe.curve(name, "mlp", "rec")) == [6, 12, 24]
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "features" / name).glob("shard-*")}
    assert main(command) == 0
    assert times == {p: p.stat().st_mtime_ns for p in times}
    source = open_frozen(EncoderSpec(name, checkpoint, layers=[6, 12, 24], image_size=224, weights="random"))
    assert source.dim == 1024
