"""Training: exact resume, what is trained and what is not, the loss of a batch however it is cut up."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_options
from PIL import Image
from safetensors.torch import load_file

from commvlm.cli import main
from commvlm.data.collate import Collator
from commvlm.data.example import Example
from commvlm.train.assemble import assemble
from commvlm.train.keys import RecipeError
from commvlm.train.parts import settle_parts
from commvlm.train.recipe import Recipe
from commvlm.train.run import train
from commvlm.train.sources import named_examples, stage_mixture
from commvlm.train.stage import run_stage
from commvlm.train.trainer import checkpoints
from commvlm.train.whole import writing

pytestmark = pytest.mark.usefixtures("imported")

Tensors = dict[str, torch.Tensor]
PARTS = ("merge", "align", "project", "language_model")
TIMES = ("seconds", "tokens_per_second")
CONV = ["--model.encoders.clip.merge", "conv-layerscale", "--model.encoders.dinov2.merge", "conv-layerscale"]


def one_stage(**settings: Any) -> list[dict[str, Any]]:
    defaults = {"name": "only", "steps": 1, "batch": 4, "warmup": 0.0, "trains": dict.fromkeys(PARTS, 1e-3)}
    return [{**defaults, **settings}]


def log_of(out: Path) -> list[dict[str, Any]]:
    """The log's rows without what may differ between two runs of one recipe."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights_of(out: Path) -> Tensors:
    return load_file(out / "model" / "model.safetensors")


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def snapshot_bytes(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in snapshot(folder).items()}


def drawn(recipe: Recipe) -> dict[Path, list[tuple[int, int]]]:
    """Every image that a run looks at -> the stages and steps (from 1) at which it does, in order."""
    examples = named_examples(recipe.data.sources, Path(recipe.data.root))
    places: dict[Path, list[tuple[int, int]]] = {}
    for number, stage in enumerate(recipe.train.stages):
        mixture = stage_mixture(stage, recipe.data, examples, seed=recipe.train.seed + number)
        for index in range(len(mixture)):
            image = mixture[index][0].image
            assert image is not None
            places.setdefault(image, []).append((number, index // stage.batch + 1))
    return places


def first_seen(recipe: Recipe, stage: int, step: int) -> Path:
    """An image that a stage draws at this step and that the run has not drawn before."""
    return next(image for image, places in drawn(recipe).items() if places[0] == (stage, step))


@contextmanager
def lost(image: Path) -> Iterator[None]:
    """The image file is away for a while."""
    away = image.with_suffix(".away")
    image.rename(away)
    try:
        yield
    finally:
        away.rename(image)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: writing on fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a run that nothing interrupts, trained once per precision."""
    root = tmp_path_factory.mktemp("straight")

    def run(precision: str) -> Path:
        if not (root / precision).exists():
            train(small("--train.precision", precision), root / precision)
        return root / precision

    return run


class TestARun:
    def test_what_it_leaves(self, small, straight):
        recipe, out = small("--train.precision", "fp32"), straight("fp32")
        assert {p.name for p in out.iterdir()} == {"model", "run.json", "log.jsonl", "recipe.yaml"}
        facts = json.loads((out / "run.json").read_text())
        assert facts["model"] == "model"
        assert facts["stages"]["align"]["encoders"] == {
            "parameters": facts["parts"]["encoders"]["parameters"], "trained": 0, "lr": None
        }  # fmt: skip
        assert facts["stages"]["align"]["align"]["lr"] == 1e-3
        assert facts["stages"]["instruct"]["align"]["trained"] == 0
        weights = facts["layer_weights"]
        assert set(weights["clip"]) == {"1", "2"}
        assert sum(weights["clip"].values()) == pytest.approx(1, abs=1e-6)
        assert [stage.name for stage in recipe.train.stages] == ["align", "instruct"]

    def test_its_log(self, straight):
        """Every second step, and at a checkpoint: those are at step 3 and at the end."""
        rows = log_of(straight("fp32"))
        assert [(row["stage"], row["step"]) for row in rows] == [
            (stage, step) for stage in ("align", "instruct") for step in (2, 3, 4, 6)
        ]
        assert all(0 < row["loss"] < 20 and row["of"] == 6 for row in rows)

    def test_what_is_printed(self, small, tmp_path, capsys):
        train(small(stages=one_stage(trains={"merge": 1e-3})), tmp_path / "run")
        lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()}
        assert lines["merge"][0] == lines["merge"][1] != "0"
        assert lines["merge"][2] == "1.0e-03"
        for part in ("encoders", "align", "project", "language_model"):
            assert lines[part][1:] == ["0", "frozen"]

    def test_it_learns(self, small, tmp_path):
        stages = one_stage(steps=25, batch=2, schedule="constant")
        train(small("--data.group", "4", "--train.log_every", "5", stages=stages), tmp_path / "run", weights="random")
        losses = [row["loss"] for row in log_of(tmp_path / "run")]
        assert losses[-1] < 0.7 * losses[0]

    def test_the_same_recipe_gives_the_same_bytes(self, small, straight, tmp_path):
        straight("bf16"), straight("fp32")
        train(small("--train.precision", "fp32"), tmp_path / "run")
        assert log_of(tmp_path / "run") == log_of(straight("fp32"))
        assert snapshot_bytes(tmp_path / "run" / "model") == snapshot_bytes(straight("fp32") / "model")

    def test_it_goes_through_the_mixture_in_order(self, small, tmp_path):
        """With a rate of 0 every step's loss is that of its own examples, by hand."""
        stages = one_stage(steps=4, batch=1, trains={"merge": 0.0})
        options = ["--train.visual_scale", "null", "--train.precision", "fp32", "--train.log_every", "1"]
        recipe = small(*options, stages=stages)
        train(recipe, tmp_path / "run")
        model, processor = assemble(recipe.model)
        examples = named_examples(recipe.data.sources, Path(recipe.data.root))
        mixture = stage_mixture(recipe.train.stages[0], recipe.data, examples, seed=recipe.train.seed)
        collator = Collator(processor.tokenizer, processor.image_processor, model.config.num_image_tokens)
        with torch.no_grad():
            by_hand = [model(**collator([mixture[index]])).loss.item() for index in range(4)]
        assert [row["loss"] for row in log_of(tmp_path / "run")] == pytest.approx(by_hand, rel=1e-4)
        assert len({round(loss, 3) for loss in by_hand}) == 4

    def test_the_blind_control_sees_grey(self, small, world, tmp_path):
        """As if every image file were grey."""
        grey = shutil.copytree(world, tmp_path / "grey")
        for path in (grey / "images").iterdir():
            Image.new("RGB", Image.open(path).size, (128, 128, 128)).save(path)
        stages = one_stage(steps=2, batch=2)
        train(small("--data.pixels", "grey", stages=stages), tmp_path / "blind")
        train(small("--data.root", str(grey), stages=stages), tmp_path / "files")
        found, expected = weights_of(tmp_path / "blind"), weights_of(tmp_path / "files")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert log_of(tmp_path / "blind") == log_of(tmp_path / "files")
        kinds = {name: json.loads((tmp_path / name / "run.json").read_text())["images"] for name in ("blind", "files")}
        assert kinds == {"blind": "grey", "files": "given"}

    def test_precision_and_seed_make_a_difference(self, small, straight, tmp_path):
        train(small("--train.precision", "fp32", "--train.seed", "1"), tmp_path / "run")
        losses = {
            tuple(row["loss"] for row in log_of(out)) for out in (straight("fp32"), straight("bf16"), tmp_path / "run")
        }
        assert len(losses) == 3


class TestResume:
    @pytest.mark.parametrize(
        ("precision", "stage", "step"),
        [("fp32", 0, 6), ("bf16", 0, 6), ("fp32", 1, 6), ("fp32", 1, 1), ("bf16", 0, 2)],
        ids=["fp32 first stage", "bf16 first stage", "fp32 second stage", "between the stages", "bf16 no checkpoint"],
    )
    def test_an_interrupted_run_ends_as_if_it_had_not_been(self, small, straight, tmp_path, precision, stage, step):
        recipe, out = small("--train.precision", precision), tmp_path / "run"
        image = first_seen(recipe, stage, step)
        with lost(image), pytest.raises(ValueError, match="no such image") as caught:
            train(recipe, out)
        assert image.name in str(caught.value)
        name = recipe.train.stages[stage].name
        assert [p.name for p in checkpoints(out / "stages" / name)] == (["checkpoint-3"] if step > 3 else [])
        assert (out / "stages" / "align" / "model").exists() == (stage == 1)
        assert not (out / "run.json").exists()
        train(recipe, out)
        assert log_of(out) == log_of(straight(precision))
        assert snapshot_bytes(out / "model") == snapshot_bytes(straight(precision) / "model")
        assert {p.name for p in out.iterdir()} == {"model", "run.json", "log.jsonl", "recipe.yaml"}

    def test_it_does_not_begin_again(self, small, tmp_path):
        """An image that is drawn before the checkpoint and never again is not looked at any more."""
        recipe, out = small("--train.precision", "fp32"), tmp_path / "run"
        with lost(first_seen(recipe, 0, 6)), pytest.raises(ValueError, match="no such image"):
            train(recipe, out)
        with lost(next(image for image, places in drawn(recipe).items() if places == [(0, 1)])):
            train(recipe, out)
        assert (out / "run.json").exists()

    def test_torn_pieces_are_not_resumed_from(self, small, straight, tmp_path):
        recipe, out = small("--train.precision", "fp32"), tmp_path / "run"
        with lost(first_seen(recipe, 0, 6)), pytest.raises(ValueError, match="no such image"):
            train(recipe, out)
        stage = out / "stages" / "align"
        torn = stage / "checkpoint-9"  # as if copied in half
        shutil.copytree(stage / "checkpoint-3", torn)
        (torn / "trainer_state.json").unlink()
        (torn / "model.safetensors").write_bytes(b"torn")
        shutil.copytree(stage / "checkpoint-3", stage / "part" / "checkpoint-4")
        (stage / "part" / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
        (stage / "model.part").mkdir()
        (out / "log.jsonl").open("a").write('{"stage": "align", "step": 4, "of": 4, "lo')
        assert [p.name for p in checkpoints(stage)] == ["checkpoint-3"]
        train(recipe, out)
        assert log_of(out) == log_of(straight("fp32"))
        assert snapshot_bytes(out / "model") == snapshot_bytes(straight("fp32") / "model")

    def test_a_finished_run_is_left_as_it_is(self, small, straight):
        out = straight("fp32")
        before = snapshot(out)
        assert train(small("--train.precision", "fp32"), out) == out / "model"
        assert snapshot(out) == before

    def test_what_a_kill_after_the_last_line_of_work_leaves_is_tidied(self, small, straight, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(straight("fp32"), out)
        (out / "stages" / "align" / "model").mkdir(parents=True)
        before = snapshot(out)
        train(small("--train.precision", "fp32"), out)
        assert not (out / "stages").exists()
        assert snapshot(out) == before

    def test_only_so_many_checkpoints_are_kept(self, small, tmp_path):
        recipe = small("--train.save_every", "1", "--train.keep", "2", stages=one_stage(steps=6, batch=1))
        with lost(first_seen(recipe, 0, 6)), pytest.raises(ValueError, match="no such image"):
            train(recipe, tmp_path / "run")
        kept = [p.name for p in checkpoints(tmp_path / "run" / "stages" / "only")]
        assert kept in (["checkpoint-4", "checkpoint-5"], ["checkpoint-3", "checkpoint-4"])  # loading is a batch ahead


class TestAFolder:
    def test_of_another_recipe_is_refused_with_key_and_both_values(self, small, straight):
        before = snapshot(straight("fp32"))
        with pytest.raises(RecipeError) as caught:
            train(small("--train.precision", "fp32", "--train.seed", "5"), straight("fp32"))
        assert "train.seed: 0 there, 5 now" in str(caught.value)
        with pytest.raises(RecipeError, match="choose another --out"):
            train(small("--train.precision", "fp32", "--model.encoders.clip.layers", "2"), straight("fp32"))
        assert snapshot(straight("fp32")) == before

    def test_with_something_else_in_it_is_refused(self, small, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(RecipeError, match="is not empty and holds no run"):
            train(small(), tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_that_was_claimed_in_half_is_claimed_again(self, small, tmp_path):
        (tmp_path / "recipe.part").write_text("na")
        train(small(stages=one_stage(trains={"merge": 1e-3}, batch=1)), tmp_path)
        assert (tmp_path / "run.json").exists()


class TestAFullDisk:
    @pytest.mark.parametrize("torn", ["weights", "optimizer"])
    def test_is_one_line_and_the_last_checkpoint_goes_on(self, world, small, straight, tmp_path, capfd, torn):
        out, recipe = tmp_path / "run", small("--train.precision", "fp32")
        command = ["train", "micro", "--out", str(out), *small_options(world, "--train.precision", "fp32")]
        checkpoint = out / "stages" / "align" / "checkpoint-3"
        with lost(first_seen(recipe, 0, 6)):
            assert main(command) == 2
        kept = snapshot(checkpoint)
        weights, optimizer = (len(kept[name][0]) for name in ("model.safetensors", "optimizer.pt"))
        assert weights < optimizer
        capfd.readouterr()
        with largest_file(100_000 if torn == "weights" else (weights + optimizer) // 2):
            assert main(command) == 2
        said = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()
        assert said[-1] == f"commvlm: error: {out}: the disk is full; free some space and run the same command again"
        assert not any("error" in line.lower() for line in said[:-1])
        assert snapshot(checkpoint) == kept
        assert main(command) == 0
        assert log_of(out) == log_of(straight("fp32"))
        assert snapshot_bytes(out / "model") == snapshot_bytes(straight("fp32") / "model")

    def test_other_failures_keep_their_names(self):
        with pytest.raises(RuntimeError, match="shapes"), writing(Path("run")):
            raise RuntimeError("shapes do not fit")
        with pytest.raises(PermissionError), writing(Path("run")):
            raise PermissionError(errno.EACCES, "denied")
        with pytest.raises(OSError, match="disk is full"), writing(Path("run")):
            raise OSError(errno.ENOSPC, "No space left on device")


class TestStages:
    def test_the_second_starts_from_the_firsts_weights(self, small, tmp_path):
        """The first stage alone, against both with a second that moves the merges alone."""
        first = one_stage(steps=2)
        train(small(stages=first), tmp_path / "one")
        second = one_stage(name="second", trains={"merge": 1e-3})
        train(small(stages=first + second), tmp_path / "two")
        one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
        moved = {name for name in one if not torch.equal(one[name], two[name])}
        assert moved == {name for name in one if ".merge." in name}

    def test_the_firsts_optimizer_is_gone_before_the_second_begins(self, small, tmp_path, monkeypatch):
        """Its states would stand beside the second's: eight bytes a number that was trained."""
        optimizers: list[Any] = []

        def staged(*args: Any, **kwargs: Any) -> Any:
            assert [one() for one in optimizers] == [None] * len(optimizers)
            trainer = run_stage(*args, **kwargs)
            optimizers.append(weakref.ref(trainer.optimizer))
            return trainer

        monkeypatch.setattr("commvlm.train.run.run_stage", staged)
        train(small(stages=[*one_stage(), *one_stage(name="second"), *one_stage(name="third")]), tmp_path / "run")
        assert len(optimizers) == 3

    def test_weights_of_sources_are_the_stages_own(self, small):
        recipe = small(stages=[*one_stage(weights={"rec": 0, "reg": 0, "vqa": 0, "caption": 0}), *one_stage(name="b")])
        recipe = replace(recipe, data=replace(recipe.data, group=1))
        examples = named_examples(recipe.data.sources, Path(recipe.data.root))
        tasks = []
        for stage in recipe.train.stages:
            mixture = stage_mixture(replace(stage, steps=100), recipe.data, examples, seed=0)
            tasks.append({mixture[index][0].task for index in range(len(mixture))})
        assert tasks == [{"pope"}, {"rec", "reg", "pope", "vqa", "caption"}]
        with pytest.raises(RecipeError, match="no source 'recc'; did you mean 'rec'"):
            stage_mixture(replace(recipe.train.stages[0], weights={"recc": 1}), recipe.data, examples, seed=0)

    @pytest.mark.parametrize("micro", [4, 1])
    def test_visual_tokens_start_as_large_as_asked(self, small, tmp_path, micro):
        """The merges' rate is 0, so the run ends with the model it starts with, but for the factor."""
        stages = one_stage(trains={"merge": 0.0}, micro_batch=micro)
        recipe = small("--train.visual_scale", "3", "--train.precision", "fp32", stages=stages)
        train(recipe, tmp_path / "run")
        examples = named_examples(recipe.data.sources, Path(recipe.data.root))
        mixture = stage_mixture(recipe.train.stages[0], recipe.data, examples, seed=recipe.train.seed)
        images = [Image.open(str(mixture[index][0].image)) for index in range(4)]
        model, processor = assemble(recipe.model)
        rows = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights_of(tmp_path / "run"), strict=False)
        with torch.no_grad():
            tokens = torch.cat(model.get_image_features(rows, return_dict=True).pooler_output)
            words = model.get_input_embeddings().weight.detach()
        assert float(tokens.pow(2).mean().sqrt() / words.pow(2).mean().sqrt()) == pytest.approx(3, rel=1e-4)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if "multi_modal_projector" in name}

    @pytest.mark.parametrize("parts", [("merge",), ("align", "project"), ("language_model",), PARTS])
    def test_trains_what_is_named_and_nothing_else(self, small, tmp_path, parts):
        recipe = small("--train.visual_scale", "null", stages=one_stage(trains=dict.fromkeys(parts, 1e-3)))
        start = assemble(recipe.model, seed=recipe.train.seed)[0]
        owner = {id(p): part for part, module in start.parts().items() for p in module.parameters()}
        part_of = {name: owner[id(p)] for name, p in start.named_parameters()}
        assert set(part_of.values()) == {"encoders", *PARTS}
        before = {name: p.detach().clone() for name, p in start.named_parameters()}
        train(recipe, tmp_path / "run")
        after = weights_of(tmp_path / "run")
        assert set(before) == set(after)
        for name, part in part_of.items():
            assert torch.equal(before[name], after[name]) == (part not in parts), name

    def test_frozen_merges_keep_what_their_batch_norms_gathered(self, small, tmp_path):
        recipe = small(*CONV, "--train.visual_scale", "null", stages=one_stage(steps=2, trains={"project": 1e-3}))
        before = assemble(recipe.model, seed=recipe.train.seed)[0].state_dict()
        train(recipe, tmp_path / "run")
        after = weights_of(tmp_path / "run")
        assert any("running_mean" in name for name in after)
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert changed
        assert all("multi_modal_projector" in name for name in changed)

    def test_a_part_that_there_is_not(self, small):
        model, _ = assemble(small().model)
        with pytest.raises(RecipeError, match="no part 'projct'; did you mean 'project'"):
            settle_parts(model, {"projct": 1e-3})
        with pytest.raises(RecipeError, match="encoders, which are trained through lora only"):
            settle_parts(model, {"encoders": 1e-3})
        with pytest.raises(RecipeError, match="no part 'xyz'; known: align, language_model, merge, project"):
            settle_parts(model, {"xyz": 1e-3})
        with pytest.raises(RecipeError, match="nothing is trained"):
            settle_parts(model, {})

    def test_a_part_without_parameters_alone_is_nothing_to_train(self, small, tmp_path):
        recipe = small("--model.encoders.dinov2.align", "identity", stages=one_stage(trains={"align": 1e-3}))
        with pytest.raises(RecipeError, match="nothing is trained"):
            train(recipe, tmp_path / "run")

    def test_an_example_that_teaches_nothing_is_named(self, small, tmp_path):
        recipe = small("--data.group", "1", "--data.sources", '[{name: odd, format: llava, images: "", files: {}}]')
        model, processor = assemble(recipe.model)
        stage = recipe.train.stages[0]
        settle_parts(model, stage.trains)
        examples = {"odd": [Example("odd:7", "dialogue", None, ())]}
        recipe = replace(recipe, train=replace(recipe.train, attention="sdpa"))
        with pytest.raises(ValueError, match=r"^example odd:7: .*nothing to supervise"):
            run_stage(recipe, stage, model, processor, examples, tmp_path / "stage", log=tmp_path / "log.jsonl")
