"""What make demo runs: variants that change one thing, their progress, and how they end."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from test_report import Page

from commvlm.app.quickstart import Run, _end, run_quickstart
from commvlm.app.variants import VARIANTS, overrides
from commvlm.train.recipe import find_recipe, load_recipe


def test_each_variant_changes_one_thing(world):
    recipes = {name: load_recipe("micro", overrides(name, world=world)) for name in VARIANTS}
    comm = recipes["comm"]
    assert {str(recipe.data.root) for recipe in recipes.values()} == {str(world)}
    assert [(e.name, e.layers, e.merge) for e in recipes["clip-last"].model.encoders] == [("clip", -1, "mean")]
    assert [e.weights for e in recipes["random-twin"].model.encoders] == ["checkpoint", "random"]
    twin = [{**vars(e), "weights": "checkpoint"} for e in recipes["random-twin"].model.encoders]
    assert twin == [vars(e) for e in comm.model.encoders]
    assert [recipe.data.pixels for recipe in recipes.values()] == ["given", "given", "given", "grey"]
    assert all(recipe.train == comm.train and recipe.evaluate == comm.evaluate for recipe in recipes.values())


def test_progress_is_read_from_what_a_run_writes(tmp_path, world):
    run = Run("comm", tmp_path, world, "micro")
    align, instruct = (stage.steps for stage in run.recipe.train.stages)
    assert run.progress() == (0, "starting")
    run.folder.mkdir()
    log = run.folder / "log.jsonl"
    row = {"stage": "instruct", "step": 20, "of": instruct, "loss": 1.23456}
    log.write_text(json.dumps({"stage": "align", "step": align}) + "\n" + json.dumps(row) + '\n{"torn')
    assert run.progress() == (align + 20, f"instruct 20/{instruct}, loss 1.235")
    (run.folder / "run.json").write_text("{}")
    (run.folder / "predictions").mkdir()
    (run.folder / "predictions" / "caption.jsonl").write_text("{}\n" * 7)
    (run.folder / "predictions" / "a.jsonl.partial").write_text("{}\n" * 3)
    assert run.progress() == (align + instruct + 10, "answering a")


def test_a_run_that_fails_is_named_with_its_last_line(tmp_path):
    out = tmp_path / "demo"
    (out / "comm").mkdir(parents=True)
    (out / "comm" / "mine.txt").write_text("not a run")
    with pytest.raises(
        ValueError, match=r"run comm failed \(exit code 2\): commvlm: error: .*holds no run of ours.*logs/comm.txt"
    ):
        run_quickstart(out, jobs=1, train=2, test=4)
    assert (out / "comm" / "mine.txt").exists()
    assert not (out / "clip-last").exists()


def test_what_still_runs_is_ended(tmp_path, world):
    runs = [Run("comm", tmp_path, world, "micro"), Run("blind", tmp_path, world, "micro")]
    runs[0].waiting = [[sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]]
    runs[0].start_next()
    _end(runs)  # the second one has not started
    assert runs[0].process is not None
    assert runs[0].process.returncode < 0


@pytest.mark.slow
def test_the_whole_demo_from_the_command_line(tmp_path):
    """Every variant, a few steps each: train, evaluate, report, and a question to the result."""
    recipe = tmp_path / "short.yaml"
    recipe.write_text(re.sub(r"steps: \d+", "steps: 3", find_recipe("micro").read_text()))
    out = run_quickstart(tmp_path / "demo", jobs=2, recipe=str(recipe), train=20, test=8)
    assert len(Page(out.read_text(encoding="utf-8")).table(0)) == 5
    image = next((tmp_path / "demo" / "world" / "images").glob("*.png"))
    command = [
        sys.executable,
        "-m",
        "commvlm.cli",
        "chat",
        str(out.parent),
        "where is the red star?",
        "--image",
        str(image),
    ]
    assert subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
