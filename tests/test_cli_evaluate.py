"""Evaluating and writing worlds from the command line, and bad input as one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from test_train import snapshot

from commvlm.cli import main


class TestEvaluation:
    def test_a_knock_out_is_asked_apart_and_said_in_the_receipt(self, run, refused):
        assert "did you mean 'dinov2'" in refused("evaluate", run, "--evaluate.knock_out", "dino", "--tasks", "vqa")
        assert main(["evaluate", str(run), "--tasks", "vqa", "--evaluate.knock_out", "dinov2"]) == 0
        apart = run / "without-dinov2"
        assert (apart / "predictions" / "vqa.jsonl").exists()
        receipt = json.loads((apart / "receipts" / "vqa.json").read_text())
        assert receipt["made"]["knock_out"] == "dinov2"

    def test_a_run_is_blind_where_that_is_asked(self, run, capsys):
        """A run that saw its images, asked about grey ones: apart, and said in the receipt; not into the same answers."""
        argv = ["evaluate", str(run), "--tasks", "caption", "--evaluate.max_new_tokens", "4"]
        for more in ([], ["--data.pixels", "grey"]):
            assert main([*argv, *more]) == 0
        made = {}
        for where in (".", "images-grey"):
            made[where] = json.loads((run / where / "receipts" / "caption.json").read_text())["made"]["images"]
        assert made == {".": "given", "images-grey": "grey"}
        texts = {json.loads(line)["text"] for line in (run / "images-grey/predictions/caption.jsonl").open()}
        assert len(texts) == 1  # twelve grey images are one
        assert main([*argv, "--data.pixels", "grey", "--out", str(run)]) == 2
        assert "holds answers of another images (given, not grey)" in capsys.readouterr().err

    def test_a_rule_that_there_is_not_is_told_before_anything_is_asked(self, refused, run):
        error = refused("evaluate", run, "--evaluate.rules.caption", "nosuch", "--evaluate.max_new_tokens", "4")
        assert "caption has no rule 'nosuch': choose one of approximate" in error
        assert not list(run.glob("predictions/*"))

    def test_predictions_scores_and_a_table(self, run, capsys):
        assert main(["evaluate", str(run), "--tasks", "caption, vqa"]) == 0
        table = capsys.readouterr().out
        assert "| caption " in table
        assert "| vqa " in table
        assert "| rec " not in table
        lines = (run / "predictions" / "caption.jsonl").read_text().splitlines()
        assert len(lines) == 12
        assert set(json.loads((run / "scores.json").read_text())) == {"caption", "vqa"}
        written = ("scores.json", "official/vqa.json")
        before = {name: kept for name, kept in snapshot(run).items() if name not in written}
        assert main(["evaluate", str(run), "--tasks", "vqa", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        scores = json.loads((run / "scores.json").read_text())
        assert printed["vqa"] == scores["vqa"]
        assert set(scores) == {"caption", "vqa"}  # what was scored before stays
        assert {name: kept for name, kept in snapshot(run).items() if name not in written} == before

    def test_questions_without_answers_are_written_to_be_sent_in(self, run, tmp_path, capsys):
        """VQAv2's test-dev, as its file is."""
        source = {"name": "dev", "format": "vqa", "images": "images", "files": {"questions": "test/questions.json"}}
        source["options"] = {"image_name": "micro_test_{image_id:012d}.png"}
        out = tmp_path / "out"
        argv = ["evaluate", str(run), "--out", str(out), "--evaluate.sources", json.dumps([source]), "--json"]
        assert main(argv) == 0
        said = capsys.readouterr()
        assert said.out == ""
        assert (
            f"vqa: not scored, its sources have no answers; to be sent in: {out / 'official' / 'vqa.json'}" in said.err
        )
        lines = (out / "predictions" / "vqa.jsonl").read_text().splitlines()
        assert len(json.loads((out / "official" / "vqa.json").read_text())) == len(lines) > 0
        assert not list(out.glob("receipts/*"))

    def test_files_of_other_tasks_need_not_be_there(self, run, refused, tmp_path):
        gone = {"name": "gone", "format": "pope", "images": "images", "files": {"questions": "nowhere.json"}}
        there = {"name": "there", "format": "karpathy", "images": "images", "files": {"annotations": "test/x.json"}}
        vqa = {"name": "own", "format": "vqa", "images": "images", "files": {"questions": "test/questions.json"}}
        vqa["options"] = {"image_name": "micro_test_{image_id:012d}.png"}
        argv = ["evaluate", str(run), "--out", str(tmp_path / "out")]
        sources = ["--evaluate.sources", json.dumps([vqa, gone, there])]
        assert main([*argv, *sources, "--tasks", "vqa"]) == 0
        assert "nowhere.json: there is no such annotation file" in refused(*argv, *sources, "--tasks", "pope")
        error = refused(*argv, *sources, "--tasks", "rec")
        assert "the recipe asks nothing of 'rec'; it asks caption, pope, vqa" in error

    def test_every_task_with_a_receipt(self, run, world, capsys):
        """REC, REG, POPE, VQA, captions and MME on the micro world's files; two receipts told apart; every rule."""
        argv = ["evaluate", str(run), "--tasks", "rec,reg,pope,vqa,caption,mme", "--json"]
        assert main(argv) == 0
        scores = json.loads(capsys.readouterr().out)
        assert set(scores) == {"rec", "reg", "pope", "vqa", "caption", "mme"}
        assert scores["mme"]["n"] == sum(figures["n"] for figures in scores["mme"]["extra"]["subtasks"].values()) > 60
        for task in scores:
            receipt = json.loads((run / "receipts" / f"{task}.json").read_text())
            assert {name: receipt[name] for name in ("task", "rule", "value", "n", "unparsable", "interval")} == {
                name: scores[task][name] for name in ("task", "rule", "value", "n", "unparsable", "interval")
            }
            assert receipt["made"]["decoding"]["max_new_tokens"] == 4
            assert all(len(file["sha256"]) == 64 for file in receipt["files"].values())
        official = run / "official"
        for name, (files, found) in {
            "pope": (["--references", "pope_random.json", "--predictions", official / "pope_random.jsonl"],
                     lambda f: 100 * f["accuracy"]),
            "vqa": (["--questions", "questions.json", "--annotations", "annotations.json",
                     "--predictions", official / "vqa.json"], lambda f: f["accuracy"]),
            "caption": (["--references", "captions.json", "--predictions", official / "caption.json",
                         "--rule", "approximate"], lambda f: 100 * f["cider"]),
            "rec": (["--references", "rec.jsonl", "--predictions", official / "rec.jsonl"], lambda f: 100 * f["accuracy"]),
            "reg": (["--references", "rec.jsonl", "--predictions", official / "reg.json", "--rule", "approximate"],
                    lambda f: 100 * f["cider"]),
        }.items():  # fmt: skip
            files = [str(world / "test" / word) if str(word).endswith((".json", ".jsonl")) else word for word in files]
            assert main(["score", name, *map(str, files), "--json"]) == 0
            figure = found(json.loads(capsys.readouterr().out))
            ours = scores[name]["extra"]["per_set"]["random"]["accuracy"] if name == "pope" else scores[name]["value"]
            assert figure == pytest.approx(ours, abs=0.006 if name == "vqa" else 1e-9), name
        rows = (official / "mme" / "count.txt").read_text().splitlines()
        assert all(len(row.split("\t")) == 4 for row in rows)
        assert [row.split("\t")[0] for row in rows[::2]] == [row.split("\t")[0] for row in rows[1::2]]
        kept = (run / "receipts" / "vqa.json").rename(run / "official.json")
        assert main([*argv[:2], "--tasks", "vqa", "--evaluate.rules.vqa", "evalai", "--evaluate.batch", "5"]) == 0
        capsys.readouterr()
        assert main(["receipts", "diff", str(kept), str(run / "receipts" / "vqa.json")]) == 0
        said = capsys.readouterr().out
        assert "scored by the rule official, B by evalai" in said
        for task in scores:
            assert main(["rescore", str(run / "predictions" / f"{task}.jsonl"), "--all-rules", "--json"]) == 0
            rows = json.loads(capsys.readouterr().out)
            assert rows[0]["value"] == scores[task]["value"]
            assert len(rows) >= 3

    def test_a_saved_model_with_a_recipe(self, run, refused, world, tmp_path, capfd):
        assert "add --recipe, such as --recipe micro" in refused("evaluate", run / "model")
        out = tmp_path / "out"
        argv = ["--recipe", "micro", "--data.root", str(world), "--tasks", "pope", "--evaluate.max_new_tokens", "4"]
        assert main(["evaluate", str(run / "model"), *argv, "--out", str(out), "--json"]) == 0
        apart = json.loads(capfd.readouterr().out)
        assert main(["evaluate", str(run), "--tasks", "pope", "--json"]) == 0
        assert json.loads(capfd.readouterr().out) == apart
        assert sorted(path.name for path in out.iterdir()) == ["official", "predictions", "receipts", "scores.json"]

    def test_several_ranks_as_torchrun_starts_them(self, run, world):
        """Two processes share the questions; the first one scores."""
        command = [sys.executable, "-m", "commvlm.cli", "evaluate", str(run), "--tasks", "pope,caption", "--json"]
        environments = [
            {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in (0, 1)
        ]
        started = [
            subprocess.Popen(command, env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for e in environments
        ]
        outputs = [process.communicate(timeout=200) for process in started]
        assert [process.returncode for process in started] == [0, 0], outputs
        assert set(json.loads(outputs[0][0])) == {"pope", "caption"}
        assert outputs[1][0] == b""
        shared = {name: (run / "predictions" / f"{name}.jsonl").read_bytes() for name in ("pope", "caption")}
        shutil.rmtree(run / "predictions")
        assert main(["evaluate", str(run), "--tasks", "pope,caption", "--json"]) == 0
        assert shared == {name: (run / "predictions" / f"{name}.jsonl").read_bytes() for name in shared}

    def test_the_question_may_stand_behind_the_options(self, finished, world, tmp_path, capsys):
        image, out = str(next((world / "images").iterdir())), str(tmp_path / "a.png")
        answers = set()
        for argv in (
            ["chat", str(finished), "where is it?", "--image", image, "--out", out],
            ["chat", str(finished), "--image", image, "--out", out, "where is it?"],
        ):
            assert main(argv) == 0
            answers.add(capsys.readouterr().out)
        assert len(answers) == 1


class TestMicroworld:
    def test_written_twice_it_is_the_same(self, tmp_path, refused):
        command = ["microworld", "write", str(tmp_path / "w"), "--train", "4", "--test", "3"]
        assert main(command) == 0
        first = snapshot(tmp_path / "w")
        assert sum(name.startswith("images/") for name in first) == 7
        assert main(command) == 0
        assert snapshot(tmp_path / "w") == first
        for other in (["--train", "5", "--test", "3"], ["--train", "4", "--test", "3", "--difficulty", "hard"]):
            error = refused("microworld", "write", tmp_path / "w", *other)
            assert "describes another world than asked for" in error
        assert snapshot(tmp_path / "w") == first

    def test_an_interrupted_call_is_repeated(self, tmp_path):
        command = ["microworld", "write", str(tmp_path / "w"), "--train", "4", "--test", "3"]
        assert main(command) == 0
        first = {name: content for name, (content, _) in snapshot(tmp_path / "w").items()}
        (tmp_path / "w" / "world.json").rename(tmp_path / "w" / "world.part")
        (tmp_path / "w" / "images" / "micro_train_000000000002.png").unlink()
        (tmp_path / "w" / "images" / "micro_train_000000000002.part").write_bytes(b"torn")
        shutil.rmtree(tmp_path / "w" / "test")
        assert main(command) == 0
        assert {name: content for name, (content, _) in snapshot(tmp_path / "w").items()} == first

    @pytest.mark.parametrize("torn", ["test.part", "world.tmp"])
    def test_a_call_that_was_killed_while_writing_is_repeated(self, tmp_path, torn):
        world = tmp_path / "w"
        command = ["microworld", "write", str(world), "--train", "2", "--test", "1"]
        assert main(command) == 0
        (world / "world.json").rename(world / "world.part")
        (world / torn).mkdir() if torn == "test.part" else (world / torn).write_text("{")
        assert main(command) == 0
        assert {p.name for p in world.iterdir()} == {"images", "train", "test", "world.json"}

    def test_an_interrupted_world_of_another_difficulty_is_not_taken_over(self, tmp_path, refused):
        world = tmp_path / "w"
        command = ["microworld", "write", str(world), "--train", "2", "--test", "1"]
        assert main(command) == 0
        (world / "world.json").rename(world / "world.part")
        assert "another world" in refused(*command, "--difficulty", "hard")

    @pytest.mark.parametrize("option", ["--train", "--test"])
    def test_a_world_needs_scenes(self, refused, tmp_path, option):
        for number in ("0", "-3"):
            assert f"argument {option}: {number} is" in refused("microworld", "write", tmp_path / "w", option, number)
        assert not (tmp_path / "w").exists()

    def test_settings_that_there_are_not(self, refused, tmp_path):
        assert "unknown difficulty 'esay'" in refused("microworld", "write", tmp_path / "w", "--difficulty", "esay")
        assert not (tmp_path / "w").exists()
