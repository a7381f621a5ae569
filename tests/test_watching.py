"""What is seen of a run: its log, its trackers, and its stopping when the loss goes wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import small_options

from commvlm.cli import main
from commvlm.train.keys import RecipeError
from commvlm.train.recipe import Recipe, load_recipe
from commvlm.train.run import check, train
from commvlm.train.sources import named_examples, stage_mixture
from commvlm.train.stage import attention
from commvlm.train.trainer import checkpoints

TRAINS = {"merge": 1e-3, "align": 1e-3, "project": 1e-3, "language_model": 5e-4}


def stage(**settings: Any) -> list[dict[str, Any]]:
    return [{"name": "only", "steps": 4, "batch": 2, "warmup": 0.0, "trains": TRAINS, **settings}]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def ids_of_step(recipe: Recipe, step: int) -> list[str]:
    examples = named_examples(recipe.data.sources, Path(recipe.data.root))
    only = recipe.train.stages[0]
    mixture = stage_mixture(only, recipe.data, examples, seed=recipe.train.seed)
    return [e.id for place in range((step - 1) * only.batch, step * only.batch) for e in mixture[place]]


def changed(recipe: Recipe, **train: Any) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **train))


class TestTheLog:
    def test_has_the_norm_of_each_part(self, small, tmp_path):
        train(small("--train.precision", "fp32", "--train.log_every", "1", stages=stage()), tmp_path / "run")
        for row in rows_of(tmp_path / "run"):
            assert set(row["grad_norms"]) == set(TRAINS)
            assert math.hypot(*row["grad_norms"].values()) == pytest.approx(row["grad_norm"], rel=1e-5)
            assert row["tokens_per_second"] > 0
            assert set(row["layer_weights"]) == {"clip", "dinov2"}

    def test_frozen_parts_have_none(self, small, tmp_path):
        train(small("--train.log_every", "1", stages=stage(trains={"merge": 1e-3}, steps=1)), tmp_path / "run")
        assert set(rows_of(tmp_path / "run")[0]["grad_norms"]) == {"merge"}

    @pytest.mark.parametrize(
        ("warmup", "rates"), [({}, [0, 1, 1, 1]), ({"warmup": 0.5}, [0, 0.5, 1, 1]), ({"warmup": 0.0}, [1, 1, 1, 1])]
    )
    @pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
    def test_says_that_rates_rise_and_stay(self, small, tmp_path, schedule, warmup, rates):
        """Over the share of the steps that recipe.yaml says, rounded up; from 0, as everywhere in the library."""
        only = {"name": "only", "steps": 4, "batch": 1, "trains": {"merge": 1e-3}, "schedule": schedule, **warmup}
        recipe = small("--train.log_every", "1", stages=[only])
        train(recipe, tmp_path / "run")
        assert load_recipe(tmp_path / "run" / "recipe.yaml").train.stages[0].warmup == warmup.get("warmup", 0.03)
        assert [row["lr"] for row in rows_of(tmp_path / "run")] == pytest.approx([1e-3 * rate for rate in rates])

    @pytest.mark.parametrize(
        ("schedule", "rates"),
        [
            ("cosine", [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]),
            ("linear", [1 - k / 4 for k in range(4)]),
        ],
    )
    def test_says_that_rates_fall(self, small, tmp_path, schedule, rates):
        given = {} if schedule == "cosine" else {"schedule": schedule}  # the default
        only = {"name": "only", "steps": 4, "batch": 1, "trains": {"merge": 1e-3}, "warmup": 0.0, **given}
        train(small("--train.log_every", "1", stages=[only]), tmp_path / "run")
        assert [row["lr"] for row in rows_of(tmp_path / "run")] == pytest.approx([1e-3 * rate for rate in rates])


class TestTrackers:
    def test_that_are_not_there_are_told_by_their_extra(self, small):
        with pytest.raises(RecipeError, match="knows no 'tensorbord'; did you mean 'tensorboard'"):
            check(changed(small(), report_to=["tensorbord"]))

    def test_one_that_is_not_installed_is_told_by_its_extra(self, small, monkeypatch):
        monkeypatch.setattr("commvlm.train.run.find_spec", lambda name: None)
        with pytest.raises(RecipeError, match=r"wandb is not installed: pip install 'commvlm\[track\]'"):
            check(changed(small(), report_to=["wandb"]))
        with pytest.raises(RecipeError, match=r"deepspeed is not installed: pip install 'commvlm\[deepspeed\]'"):
            check(changed(small(), engine="zero2"))

    def test_tensorboard_gets_norms_and_layer_weights(self, small, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        options = ("--train.report_to", "[tensorboard]", "--train.log_every", "1", "--train.save_every", "2")
        train(small(*options, stages=stage()), tmp_path / "run")
        (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.*")}
        found = EventAccumulator(str(folder)).Reload()
        assert {"train/loss", "train/grad_norm/merge", "train/layer_weight/clip/1"} <= set(found.Tags()["scalars"])
        assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(
            [row["loss"] for row in rows_of(tmp_path / "run")], rel=1e-5
        )


class TestALossThatGoesWrong:
    def test_stops_before_it_changes_a_weight_and_leaves_the_ids(self, small, world, tmp_path, capfd):
        """A rate that no model survives: the first update's, taken, makes the second's loss no number."""
        out, options = tmp_path / "run", ["--train.precision", "fp32", "--train.save_every", "1"]
        stages = stage(trains=dict.fromkeys(TRAINS, 1e30), clip=0.0)
        assert main(["train", "micro", "--out", str(out), *small_options(world, *options, stages=stages)]) == 2
        said = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()
        stopped = json.loads((out / "stopped.json").read_text())
        assert said[-1].startswith(f"commvlm: error: step {stopped['step']}: the loss is ")
        assert str(out / "stopped.json") in said[-1]
        assert stopped["ids"] == ids_of_step(small(*options, stages=stages), stopped["step"])
        assert stopped["step"] == 2
        assert not math.isfinite(stopped["loss"]) or not math.isfinite(stopped["grad_norm"])
        assert [p.name for p in checkpoints(out / "stages" / "only")] == ["checkpoint-1"]
        assert not (out / "run.json").exists()

    def test_far_from_the_mean_before_stops_where_it_is_asked(self, small, tmp_path):
        options = ("--train.precision", "fp32", "--train.log_every", "1")
        wild = dict.fromkeys(TRAINS, 0.5)
        recipe = small(*options, stages=stage(trains=wild, spike=1.5))
        with pytest.raises(ValueError, match="times the mean before"):
            train(recipe, tmp_path / "run")
        stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
        assert stopped["loss"] > 1.5 * stopped["mean_loss_before"]
        assert stopped["mean_loss_before"] == rows_of(tmp_path / "run")[-1]["loss"]
        calm = small(*options, stages=stage(spike=3.0))
        train(calm, tmp_path / "calm")
        with pytest.raises(RecipeError, match="spike is 1"):
            check(small(stages=stage(spike=1.0)))


class TestSettings:
    def test_checkpointing_changes_nothing_but_memory(self, small, tmp_path):
        for name, again in (("kept", "false"), ("again", "true")):
            options = ("--train.precision", "fp32", "--train.log_every", "1", "--train.checkpointing", again)
            train(small(*options, stages=stage(steps=2)), tmp_path / name)
        kept, again = ([row["loss"] for row in rows_of(tmp_path / name)] for name in ("kept", "again"))
        assert again == pytest.approx(kept, rel=1e-5)

    def test_attention_by_what_there_is(self, small, monkeypatch):
        assert attention(changed(small(), attention="auto")) == "sdpa"
        monkeypatch.setattr("commvlm.train.stage.is_flash_attn_2_available", lambda: True)
        grouped = changed(small(), attention="auto")
        assert grouped.data.group == 2
        assert attention(grouped) == "sdpa"
        alone = replace(grouped, data=replace(grouped.data, group=1))
        assert attention(alone) == "flash_attention_2"
        monkeypatch.setattr("commvlm.train.stage.is_flash_attn_2_available", lambda: False)
        with pytest.raises(RecipeError, match=r"needs a GPU and flash-attn: pip install 'commvlm\[gpu\]'"):
            attention(changed(alone, attention="flash_attention_2"))

    @pytest.mark.slow
    def test_compiled_parts_learn_as_others_do(self, small, tmp_path):
        for name, parts in (("plain", "[]"), ("compiled", "[language_model, align]")):
            options = ("--train.precision", "fp32", "--train.log_every", "1", "--train.compile", parts)
            train(small(*options, "--train.attention", "sdpa", stages=stage(steps=2)), tmp_path / name)
        plain, compiled = ([row["loss"] for row in rows_of(tmp_path / name)] for name in ("plain", "compiled"))
        assert compiled == pytest.approx(plain, rel=1e-4)
        names = {p.name for p in (tmp_path / "compiled" / "model").iterdir()}
        assert names == {p.name for p in (tmp_path / "plain" / "model").iterdir()}

    def test_a_part_that_cannot_be_compiled_is_named(self, small):
        with pytest.raises(RecipeError, match="names no part 'languagemodel'; did you mean"):
            check(changed(small(), compile=["languagemodel"]))
