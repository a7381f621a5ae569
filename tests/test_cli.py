"""The command line: help, and bad input as one line and exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from conftest import called, small_options
from PIL import Image
from test_train import largest_file

from commvlm.cli import main

COMMANDS = [
    "inspect", "build", "train", "evaluate", "chat", "demo", "microworld", "microworld write", "microworld pretrain",
    "microworld card", "quickstart", "score", "score pope", "score mme", "score vqa", "score caption", "score rec",
    "score reg", "rescore", "receipts", "receipts diff", "probe", "probe layers", "probe report", "probe simmap",
    "probe pca", "probe advise", "probe features", "serve", "export", "study",
]  # fmt: skip


@pytest.fixture
def own_world(world, tmp_path) -> Path:
    return shutil.copytree(world, tmp_path / "world")


def bomb(path: Path) -> Path:
    """A PNG of a few bytes that says it has 100000 x 100000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def cut(path: Path) -> Path:
    """A JPEG that ends in the middle."""
    Image.linear_gradient("L").convert("RGB").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:700])
    return path


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_help_with_examples(self, command, capsys):
        assert called([*command.split(), "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: commvlm {command}")
        examples = out.split("examples:\n")[1].splitlines()
        assert any(line.strip().startswith(f"commvlm {command.split()[0]}") for line in examples)
        if command in ("microworld", "score", "probe"):
            return  # its examples are those of its actions
        for option in re.findall(r"(?<= )--\w+(?=[ \n])", "\n".join(examples)):  # dotted ones are keys of the recipe
            assert re.search(rf"(?<!\w){option}\b", out.split("examples:\n")[0]), option

    def test_the_list_of_commands(self, capsys):
        assert called(["--help"]) == 0
        out = capsys.readouterr().out
        assert all(command.split()[0] in out for command in COMMANDS)

    def test_version_and_help_do_not_wait_for_torch(self):
        code = "import sys\nfrom commvlm.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
        for option in ("--version", "--help"):
            done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
            assert "commvlm" in done.stdout
            assert done.stderr == ""


class TestCommands:
    @pytest.mark.parametrize(
        ("argv", "text"),
        [
            ([], "required: COMMAND; see commvlm --help"),
            (["trian"], "invalid choice: 'trian'"),
            (["train", "micro"], "required: --out; see commvlm train --help"),
            (["train"], "required: recipe, --out"),
            (["microworld"], "required: ACTION"),
            (["microworld", "pretrain", "siglip", "--out", "x"], "invalid choice: 'siglip'"),
            (["microworld", "write", "x", "--train", "many"], "argument --train: 'many' is no number"),
            (["chat", "run", "--foo", "bar"], "unknown option '--foo' for chat; see commvlm chat --help"),
            (["quickstart", "--train.seed", "3"], "unknown option '--train.seed' for quickstart"),
            (["build", "micro", "--out", "x", "--weights", "some"], "invalid choice: 'some'"),
            (["inspect", "mirco"], "there is no recipe 'mirco'; did you mean 'micro'?"),
            (["inspect", "micro", "--train.sede", "3"], "unknown option '--train.sede'; did you mean '--train.seed'?"),
            (["inspect", "--train.sede", "3", "micro"], "unknown option '--train.sede'; did you mean '--train.seed'?"),
            (["inspect", "micro", "--train.seed"], "option '--train.seed' has no value"),
            (["inspect", "--train.seed", "--json", "micro"], "option '--train.seed' has no value"),
            (["inspect", "micro", "--seed", "3"], "unknown option '--seed'; did you mean '--train.seed'?"),
        ],
    )
    def test_what_cannot_be_parsed(self, refused, argv, text, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert text in refused(*argv)
        assert list(tmp_path.iterdir()) == []

    def test_the_program_itself(self, tmp_path):
        """Through a process of its own, installed and as a module."""
        for program in ([str(Path(sys.executable).with_name("commvlm"))], [sys.executable, "-m", "commvlm.cli"]):
            done = subprocess.run(
                [*program, "inspect", "mirco"], capture_output=True, text=True, cwd=tmp_path, check=False
            )
            assert done.returncode == 2
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1
            assert done.stderr.startswith("commvlm: error: there is no recipe 'mirco'; did you mean 'micro'?")


class TestRecipes:
    @pytest.mark.parametrize(
        ("layers", "text"),
        [
            ("0", "there is no layer 0, layers count from 1; the encoder has 24 layers"),
            ("25", "layer 25 is beyond the last one"),
            ("-25", "layer -25 is beyond the last one"),
            ("19-", "layers '19-': it cannot be read"),
            ("24-19", "it ends (19) before it starts (24)"),
            ("[3, 3]", "layer 3 is asked for twice"),
            ("[]", "no layer is asked for"),
        ],
    )
    @pytest.mark.parametrize("command", [["inspect"], ["build", "--weights", "random", "--out", "x"]])
    def test_wrong_layer_numbers_of_comm_7b(self, refused, world, tmp_path, monkeypatch, command, layers, text):
        monkeypatch.chdir(tmp_path)
        lm = ["--model.language_model", "micro:lm"]  # its tokenizer is at hand
        error = refused(*command, "comm-7b", *lm, "--model.encoders.clip.layers", layers)
        assert "encoder 'clip' (openai/clip-vit-large-patch14-336)" in error
        assert text in error
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--model.encoders.dinov2.image_size", "224"],
             "the grids of encoders 'clip' (24 x 24, image_size 336) and 'dinov2' (16 x 16, image_size 224) differ: "
             "channel-concat needs equal ones; set image_size of 'dinov2' to 336"),
            (["--model.encoders.dinov2.image_size", "null"], "'dinov2' (37 x 37, image_size 518) differ"),
            (["--model.encoders.dinov2.image_size", "300"], "not a multiple of its patch size 14; set image_size to 294"),
            (["--model.encoders.clip.merge", "lln-layerscal"], "did you mean 'lln-layerscale'?"),
            (["--model.encoders.clip.merge", "{kind: mean, x: 1}"], "merge 'mean' has no option 'x'"),
            (["--model.encoders.clip.checkpoint", "facebook/dinov2-lrge"], "did you mean 'facebook/dinov2-large'?"),
            (["--model.encoders.clip.checkpoint", "micro:clap"], "no tiny checkpoint 'micro:clap'"),
            (["--model.reduce", "{kind: pool, factor: two}"], "reduce 'pool': "),
            (["--model.fuse", "{kind: channel-concat, grid: 3.5}"], "fuse has grid 3.5"),
            (["--model.project", "{kind: mlp, hidden: 1.5}"], "project 'mlp': "),
            (["--model.encoders.clip.merge", "{kind: [a]}"], "merge has kind ['a']"),
            (["--model.pad_color", "[1, 2]"], "pad_color is [1, 2], it must be red, green and blue"),
            (["--model.pad_color", "[300, 0, 0]"], "pad_color is [300, 0, 0]"),
            (["--model.encoders.clip.name", "dinov2"], "two encoders are called 'dinov2'"),
            (["--model.encoders", "[]"], "a model needs at least one encoder"),
            (["--model.language_model", "openai/clip-vit-large-patch14"], "not a causal language model"),
        ],
    )  # fmt: skip
    def test_parts_that_do_not_fit(self, refused, options, text):
        assert text in refused("inspect", "comm-7b", *options)

    def test_a_file_that_is_no_recipe(self, refused, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("name: x\nmodel: [\n")
        assert "mine.yaml:3: not YAML" in refused("train", path, "--out", tmp_path / "run")
        path.write_text("name: x\nmodle: {}\n")
        assert refused("inspect", path) == "mine.yaml: unknown key 'modle'; did you mean 'model'?"
        assert not (tmp_path / "run").exists()

    def test_a_tokenizer_or_weights_that_are_not_at_hand(self, refused, tmp_path):
        error = refused("build", "comm-7b", "--weights", "random", "--out", tmp_path / "x")
        assert "no tokenizer for language model 'lmsys/vicuna-7b-v1.5'" in error
        error = refused("build", "comm-7b", "--model.language_model", "micro:lm", "--out", tmp_path / "x")
        assert "the weights of 'openai/clip-vit-large-patch14-336' cannot be had" in error
        assert list(tmp_path.iterdir()) == []


class TestOut:
    """Folders that cannot be written, or hold something else."""

    def test_under_a_file(self, refused, world, tmp_path):
        file = tmp_path / "file"
        file.write_text("text")
        small = small_options(world)
        assert "Not a directory" in refused("train", "micro", "--out", file / "run", *small)
        assert "Not a directory" in refused("build", "micro", "--out", file / "model", *small)
        assert "Not a directory" in refused("microworld", "write", file / "world", "--train", "1", "--test", "1")
        assert file.read_text() == "text"

    def test_a_file_itself(self, refused, world, tmp_path):
        file = tmp_path / "file"
        file.write_text("text")
        refused("train", "micro", "--out", file, *small_options(world))
        assert "choose another --out" in refused("build", "micro", "--out", file, *small_options(world))
        refused("microworld", "write", file)
        assert file.read_text() == "text"

    def test_not_empty(self, refused, world, tmp_path):
        (tmp_path / "thesis.tex").write_text("text")
        assert "not empty and holds no run" in refused("train", "micro", "--out", tmp_path, *small_options(world))
        assert "choose another --out" in refused("build", "micro", "--out", tmp_path, *small_options(world))
        assert "not empty and holds no micro world" in refused("microworld", "write", tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_full_disk_while_building(self, refused, world, tmp_path):
        with largest_file(100_000):
            error = refused("build", "micro", "--weights", "random", "--out", tmp_path / "model", *small_options(world))
        assert error == f"{tmp_path / 'model'}: the disk is full; free some space and run the same command again"
        assert list(tmp_path.iterdir()) == []

    def test_building_and_loading_what_was_built(self, world, tmp_path, capsys):
        out = tmp_path / "deep" / "model"
        assert main(["build", "micro", "--weights", "random", "--out", str(out), *small_options(world)]) == 0
        assert "64 visual tokens an image" in capsys.readouterr().out
        assert [p.name for p in out.parent.iterdir()] == ["model"]
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(out)
        processor = AutoProcessor.from_pretrained(out)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        image = Image.open(next((world / "images").iterdir()))
        inputs = processor(images=[image], text=text, return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


class TestAnnotations:
    def test_a_broken_line_is_named_in_training(self, refused, own_world, tmp_path):
        lines = (own_world / "train" / "rec.jsonl").read_text().splitlines()
        lines[16] = lines[16][:30]
        (own_world / "train" / "rec.jsonl").write_text("\n".join(lines))
        error = refused("train", "micro", "--out", tmp_path / "run", *small_options(own_world))
        assert error.startswith("source 'rec': rec.jsonl:17: not JSON")

    def test_a_broken_line_is_named_in_evaluation(self, refused, own_world, run):
        path = own_world / "test" / "pope_popular.json"
        lines = path.read_text().splitlines()
        lines[4] = lines[4].replace('"yes"', '"perhaps"').replace('"no"', '"perhaps"')
        path.write_text("\n".join(lines))
        error = refused("evaluate", run, "--data.root", own_world)
        assert error == "source 'pope-popular': pope_popular.json:5: has label 'perhaps', it must be yes or no"

    def test_a_file_that_is_not_there(self, refused, own_world, run):
        (own_world / "test" / "captions.json").unlink()
        error = refused("evaluate", run, "--data.root", own_world)
        assert "source 'caption': " in error
        assert "captions.json: there is no such annotation file" in error

    def test_a_root_that_is_not_there(self, refused, run, tmp_path):
        error = refused("evaluate", run, "--data.root", tmp_path / "nowhere")
        assert error.startswith(f"data.root {tmp_path / 'nowhere'} is no folder")

    def test_an_option_that_the_format_does_not_have(self, refused, world, tmp_path):
        options = small_options(world, "--data.sources.rec.options", "{taks: rec}")
        assert "did you mean 'task'?" in refused("train", "micro", "--out", tmp_path / "run", *options)


class TestImages:
    @pytest.mark.parametrize(
        ("make", "text"),
        [(bomb, "too large"), (cut, "cannot be decoded"), (None, "there is no such image")],
    )
    def test_in_evaluation(self, refused, run, own_world, make, text):
        image = own_world / "images" / "micro_test_000000000003.png"
        image.unlink() if make is None else make(image)
        error = refused("evaluate", run, "--tasks", "caption", "--data.root", own_world)
        assert str(image) in error
        assert text in error
        assert not (run / "scores.json").exists()

    @pytest.mark.parametrize(
        ("make", "text"),
        [(bomb, "too large"), (cut, "cannot be decoded"), (None, "there is no such image")],
    )
    def test_in_chat(self, refused, finished, tmp_path, make, text):
        image = tmp_path / "image.png"
        if make is not None:
            make(image)
        error = refused("chat", finished, "--image", image, "where is it?")
        assert str(image) in error
        assert text in error

    @pytest.mark.parametrize("make", [bomb, cut])
    def test_in_training(self, refused, own_world, tmp_path, make):
        for image in (own_world / "images").glob("micro_train_*"):
            make(image)
        error = refused("train", "micro", "--out", tmp_path / "run", *small_options(own_world))
        assert "micro_train_" in error


class TestCheckpoints:
    @pytest.mark.parametrize("command", [["evaluate"], ["chat"]])
    def test_a_folder_that_is_none(self, refused, command, tmp_path, world):
        image = next((world / "images").iterdir())
        rest = [] if command == ["evaluate"] else ["where is it?", "--image", str(image)]
        for folder in (tmp_path, tmp_path / "nowhere", image):
            error = refused(*command, folder, *rest)
            assert str(folder) in error
            assert "is no checkpoint" in error

    def test_an_unfinished_run(self, refused, run, world):
        (run / "run.json").unlink()
        assert "run.json" in refused("evaluate", run)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": "model"}'])
    def test_a_broken_run(self, refused, run, content):
        (run / "run.json").write_text(content)
        assert "run.json" in refused("evaluate", run, "--tasks", "caption")

    def test_broken_weights(self, refused, run):
        weights = run / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        assert "cannot be loaded" in refused("evaluate", run, "--tasks", "caption")

    def test_tasks_that_there_are_not(self, refused, run):
        assert "there is no task 'recc' to evaluate" in refused("evaluate", run, "--tasks", "rec,recc")
        error = refused("evaluate", run, "--tasks", "vqa", "--evaluate.sources", "[]")
        assert "evaluate.sources" in error
        source = {"name": "a", "format": "pope", "images": "images", "files": {"questions": "test/pope_random.json"}}
        error = refused("evaluate", run, "--tasks", "vqa", "--evaluate.sources", json.dumps([source]))
        assert "asks nothing of 'vqa'; it asks pope" in error
