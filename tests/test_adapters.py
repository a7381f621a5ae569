"""LoRA: what learns and what does not, resume, and the plain model in the end."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import KillAtStep, start
from safetensors.torch import load_file, save_file
from test_parallel import command, log_of
from test_train import CONV

from commvlm.app.checkpoint import load_checkpoint
from commvlm.cli import main
from commvlm.model.checkpoints import CheckpointError
from commvlm.train.adapters import FILE, Adapters, load_trained, save_trained
from commvlm.train.assemble import assemble
from commvlm.train.keys import RecipeError
from commvlm.train.parts import settle_parts
from commvlm.train.recipe import Lora
from commvlm.train.run import check, train
from commvlm.train.trainer import Diverged, StageTrainer

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
TRAINS = {"merge": 1e-3, "align": 1e-3, "project": 1e-3, "language_model": 1e-2}


def adapted(world: Path, out: Path, **lora: Any) -> list[str]:
    return command(world, out, lora={**LORA, **lora}, trains=TRAINS, steps=6, batch=2)


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> Path:
    """A run with adapters in the language model that nothing interrupts."""
    out = tmp_path_factory.mktemp("lora") / "run"
    assert main(adapted(world, out)) == 0
    return out


class TestWhatLearns:
    def test_is_the_adapters_and_what_trains_names(self, small, straight):
        """The linear layers of the language model's blocks have changed, the head and the norms have not."""
        before = dict(assemble(small().model)[0].named_parameters())
        after = load_file(straight / "model" / "model.safetensors")
        assert set(after) == set(before)  # a plain model
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].detach())}
        linear = {n for n in before if ".layers." in n and "language_model" in n and n.endswith("proj.weight")}
        between = {n for n in before if ".branches." in n or "multi_modal_projector" in n}
        assert linear
        assert changed == linear | between

    def test_is_told_and_kept(self, straight, capsys):
        row = json.loads((straight / "run.json").read_text())["stages"]["only"]["language_model"]
        assert row["lora"] == 4
        assert 0 < row["trained"] < row["parameters"] / 2
        assert row["lr"] == 1e-2

    def test_the_merged_model_says_what_the_adapted_one_says(self, small):
        torch.manual_seed(0)
        recipe = small()
        model, _ = assemble(recipe.model)
        ids = torch.randint(5, 60, (2, 12))
        plain = model(input_ids=ids).logits
        adapters = Adapters(model, Lora(rank=4, parts=["language_model", "encoders"]), seed=1, dtype=torch.float32)
        torch.testing.assert_close(model(input_ids=ids).logits, plain)  # adapters begin as nothing
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.2)
        expected = model(input_ids=ids).logits
        assert (expected - plain).abs().max() > 0.1
        adapters.merge()
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert not any("lora" in name for name, _ in model.named_modules())

    def test_encoders_learn_through_adapters_alone(self, small, world, tmp_path):
        argv = command(
            world, tmp_path / "run", trains={"encoders": 1e-2}, lora={**LORA, "parts": ["encoders"]}, steps=2
        )
        assert main(argv) == 0
        before = dict(assemble(small().model)[0].named_parameters())
        after = load_file(tmp_path / "run" / "model" / "model.safetensors")
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].detach())}
        assert changed
        assert all(".enc_" in name and name.endswith("weight") for name in changed)
        assert {name.split("enc_")[1].split(".")[0] for name in changed} == {"clip", "dinov2"}

    @pytest.mark.parametrize(
        ("trains", "lora", "said"),
        [
            ({"encoders": 1e-3}, {}, "encoders, which are trained through lora only"),
            ({"merge": 1e-3}, {"rank": 4}, "lora.parts names 'language_model', but trains does not"),
            (TRAINS, {"rank": 4, "parts": ["languagemodel"]}, "no part 'languagemodel'; did you mean 'language_model'"),
            (TRAINS, {"rank": 4, "dropout": 1.0}, "dropout from 0 to below 1"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, small, trains, lora, said):
        recipe = small()
        stage = replace(recipe.train.stages[0], trains=trains, lora=Lora(**lora))
        with pytest.raises(RecipeError, match=said):
            check(replace(recipe, train=replace(recipe.train, stages=[stage])))

    @pytest.mark.parametrize(
        ("lora", "options", "said"),
        [
            ({"dropout": 0.1}, {"checkpointing": True}, "lora.dropout with train.engine fsdp and train.checkpointing"),
            ({"parts": ["language_model", "encoders"]}, {"checkpointing": True}, "adapters in encoders do not go with"),
            ({"bits": 4}, {}, "lora.bits 4 is for train.engine ddp: fsdp cannot"),
        ],
    )
    def test_what_fsdp_would_train_wrongly_or_not_save_is_refused(self, small, lora, options, said, monkeypatch):
        monkeypatch.setattr("commvlm.train.run.check_bits", lambda bits: None)  # bitsandbytes may not be there
        recipe = small()
        stage = recipe.train.stages[0]
        trains = {**stage.trains, **dict.fromkeys(lora.get("parts", ()), 1e-3)}
        stage = replace(stage, trains=trains, lora=Lora(rank=4, **lora))
        train_ = replace(recipe.train, stages=[stage], engine="fsdp", **options)
        with pytest.raises(RecipeError, match=said):
            check(replace(recipe, train=train_), count=2)
        check(replace(recipe, train=replace(train_, engine="ddp")), count=2)
        if options:
            check(replace(recipe, train=replace(train_, checkpointing=False)), count=2)

    def test_layers_that_there_are_not_are_refused(self, small):
        model, _ = assemble(small().model)
        with pytest.raises(RecipeError, match="no layer 'q_porj'; layers: all-linear, down_proj, gate_proj, k_proj"):
            Adapters(model, Lora(rank=2, targets=["q_porj"]), seed=0, dtype=torch.float32)
        Adapters(model, Lora(rank=2, targets=["q_proj", "v_proj"]), seed=0, dtype=torch.float32)
        report = settle_parts(model, {"language_model": 1e-3}, Lora(rank=2))
        learning = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
        assert learning == {"q_proj", "v_proj"}
        assert sum(row["trained"] for row in report.values()) == report["language_model"]["trained"]


class TestInterrupted:
    def test_a_killed_run_ends_as_if_it_had_not_been(self, world, straight, tmp_path):
        """Dropout and all; the checkpoint on the way holds what is trained and nothing else."""
        argv = adapted(world, tmp_path / "run")
        assert start(argv, tmp_path, spies=[KillAtStep(5)]).wait() == [-9]
        kept = tmp_path / "run" / "stages" / "only" / "checkpoint-3"
        names = set(load_file(kept / FILE))
        assert not (kept / "model.safetensors").exists()
        assert all(".lora_" in name for name in names if "language_model" in name)
        assert {part for part in ("lora_A", "lora_B", "branches", "projector") if any(part in n for n in names)} == {
            "lora_A", "lora_B", "branches", "projector"
        }  # fmt: skip
        assert not any(".enc_" in name for name in names)
        assert main(argv) == 0
        assert log_of(tmp_path / "run") == log_of(straight)
        for file in (straight / "model").iterdir():
            assert (tmp_path / "run" / "model" / file.name).read_bytes() == file.read_bytes()

    @pytest.mark.parametrize(
        ("trains", "written"),
        [
            pytest.param({"language_model": 1e-2}, True, id="adapters alone"),
            pytest.param(TRAINS, True, id="all", marks=pytest.mark.slow),
            pytest.param({"language_model": 1e-2}, False, id="adapters alone, older", marks=pytest.mark.slow),
            pytest.param(TRAINS, False, id="all, older", marks=pytest.mark.slow),
        ],
    )
    def test_a_run_whose_stages_are_done_is_finished_and_says_what_they_trained(
        self, small, tmp_path, monkeypatch, trains, written
    ):
        """The second stage goes on from the first one's merged model; older versions did not write down what is trained."""
        first = {"name": "first", "steps": 1, "batch": 2, "warmup": 0.0, "trains": trains, "lora": LORA}
        recipe = small(stages=[first, {**first, "name": "second", "lora": {**LORA, "rank": 2}}])
        train(recipe, tmp_path / "straight")

        def lost(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("commvlm.train.run._finish", lost)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, tmp_path / "run")
        kept = sorted((tmp_path / "run").glob("stages/*/parts.json"))
        assert len(kept) == 2
        for file in kept * (not written):
            file.unlink()
        with monkeypatch.context() as patched:
            if written:
                patched.setattr("commvlm.train.run.Adapters", None)  # nothing is made ready once more
            train(recipe, tmp_path / "run")
        said, expected = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "straight"))
        for key in ("parts", "stages"):
            assert said[key] == expected[key]
        assert (
            said["stages"]["first"]["language_model"]["trained"] == 2 * said["parts"]["language_model"]["trained"] > 0
        )
        one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "straight"))
        assert all(torch.equal(one[name], two[name]) for name in two)

    def test_batch_norms_go_on_from_what_they_gathered(self, small, tmp_path, monkeypatch):
        only = {"name": "only", "steps": 5, "batch": 2, "warmup": 0.0, "trains": TRAINS, "lora": LORA}
        recipe = small(*CONV, "--train.precision", "fp32", stages=[only])
        train(recipe, tmp_path / "straight")
        clip = StageTrainer._clip_grad_norm

        def stopping(trainer: Any, model: Any) -> Any:
            if trainer.state.global_step + 1 == 5:
                raise KeyboardInterrupt
            return clip(trainer, model)

        with monkeypatch.context() as patched:
            patched.setattr(StageTrainer, "_clip_grad_norm", stopping)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, tmp_path / "run")
        train(recipe, tmp_path / "run")
        one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "straight"))
        counts = [tensor.item() for name, tensor in two.items() if name.endswith("num_batches_tracked")]
        assert set(counts) == {5}
        assert {name for name in two if not torch.equal(one[name], two[name])} == set()

    def test_checkpoints_without_statistics_are_loaded(self, small, tmp_path):
        model, _ = assemble(small(*CONV).model)
        settle_parts(model, {"merge": 1e-3})
        weights = {name: torch.rand_like(p) for name, p in model.named_parameters() if p.requires_grad}
        save_file(weights, tmp_path / FILE)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        load_trained(model, tmp_path)
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    def test_statistics_of_frozen_batch_norms_are_not_among_what_is_trained(self, small, tmp_path):
        model, _ = assemble(small(*CONV).model)
        settle_parts(model, {"project": 1e-3})
        save_trained(model, tmp_path)
        assert set(load_file(tmp_path / FILE)) == {n for n, p in model.named_parameters() if p.requires_grad}

    def test_weights_of_other_adapters_are_refused(self, small, tmp_path):
        model, _ = assemble(small().model)
        settle_parts(model, {"merge": 1e-3})
        save_trained(model, tmp_path)
        settle_parts(model, {"align": 1e-3})
        with pytest.raises(ValueError, match="does not hold what is trained here"):
            load_trained(model, tmp_path)


class TestTheFinishedModel:
    def test_is_a_plain_checkpoint(self, straight):
        model, processor = load_checkpoint(straight)
        assert not any("lora" in name for name, _ in model.named_parameters())
        assert processor.tokenizer is not None

    def test_begins_another_run(self, small, straight, tmp_path):
        """train.start: the second run's frozen weights are the first one's; another model is refused key by key."""
        stages = [{"name": "next", "steps": 1, "batch": 2, "warmup": 0, "trains": {"merge": 1e-3}}]
        recipe = small("--train.start", str(straight), stages=stages)
        train(recipe, tmp_path / "run")
        one, two = (load_file(run / "model" / "model.safetensors") for run in (straight, tmp_path / "run"))
        assert {name for name in one if not torch.equal(one[name], two[name])} == {n for n in one if ".merge." in n}
        with pytest.raises(CheckpointError) as caught:
            train(
                small("--train.start", str(straight), "--model.encoders.clip.layers", "2", stages=stages),
                tmp_path / "b",
            )
        assert "is another model (vision_config.branches[0].layers: [1, 2] there, [2] in the recipe" in str(
            caught.value
        )
        with pytest.raises(ValueError, match="is no finished run and no saved model"):
            train(small("--train.start", str(tmp_path), stages=stages), tmp_path / "c")

    def test_a_checkpoint_on_the_way_begins_another_run(self, small, tmp_path, monkeypatch):
        """What docs/training.md says to do after a step that diverged."""
        stages = [{"name": "only", "steps": 4, "batch": 2, "warmup": 0, "trains": {"merge": 1e-3, "project": 1e-3}}]
        own = StageTrainer._check

        def diverging(trainer: StageTrainer, step: int, loss: float, norm: float) -> None:
            own(trainer, step, math.nan if step == 3 else loss, norm)

        monkeypatch.setattr(StageTrainer, "_check", diverging)
        with pytest.raises(Diverged, match="step 3: the loss is nan"):
            train(small("--train.save_every", "2", stages=stages), tmp_path / "one")
        kept = tmp_path / "one" / "stages" / "only" / "checkpoint-2"
        weights = load_file(kept / "model.safetensors")
        only = [{"name": "next", "steps": 1, "batch": 2, "warmup": 0, "trains": {"merge": 1e-3}}]
        train(small("--train.start", str(kept), stages=only), tmp_path / "two")
        found = load_file(tmp_path / "two" / "model" / "model.safetensors")
        frozen = [name for name in found if ".merge." not in name]
        assert any("multi_modal_projector" in name for name in frozen)
        assert all(torch.equal(found[name], weights[name]) for name in frozen)
        start = assemble(small().model)[0].state_dict()
        assert not all(torch.equal(found[name], start[name]) for name in frozen)


class TestFourBits:
    def test_without_bitsandbytes_are_refused_naming_the_extra(self, small, monkeypatch):
        monkeypatch.setattr("commvlm.train.adapters.find_spec", lambda name: None)
        recipe = small()
        stage = replace(recipe.train.stages[0], lora=Lora(rank=4, bits=4))
        with pytest.raises(RecipeError, match=r"lora.bits 4 needs bitsandbytes: pip install 'commvlm\[qlora\]'"):
            check(replace(recipe, train=replace(recipe.train, stages=[stage])))

    def test_learn_beside_weights_that_stay_whole(self, small, world, tmp_path):
        """What the adapters learned beside 4 bits is added to the weights as they were; all others keep theirs."""
        pytest.importorskip("bitsandbytes")
        model, _ = assemble(small().model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ids = torch.arange(5, 29).view(2, 12)
        plain = model(input_ids=ids).logits.detach()
        Adapters(model, Lora(rank=4, bits=4), seed=0, dtype=torch.float32)
        error = (model.to("cpu")(input_ids=ids).logits.detach() - plain).abs().max()
        assert 0.01 < error < 0.5 * plain.abs().max()
        argv = command(world, tmp_path / "run", trains={"language_model": 1e-2}, lora={**LORA, "bits": 4}, steps=2)
        assert main(argv) == 0
        after = load_file(tmp_path / "run" / "model" / "model.safetensors")
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert changed == {n for n in before if ".layers." in n and "language_model" in n and n.endswith("proj.weight")}
        for name in changed:
            rank = torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3)
            assert 1 <= rank <= 4, name
