"""The plan of a training run, against runs that are measured and against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ALL
from transformers import DINOv3ViTConfig, LlamaConfig, TrainingArguments

from commvlm.app import planning
from commvlm.app.gpus import GPUS, Gpu
from commvlm.app.planning import Machine, Planner, Text, machine, paper_hours, remedies
from commvlm.cli import main
from commvlm.model.build import build_model
from commvlm.model.cost import inspect_visual_half
from commvlm.model.dry import Held, Shape, Way, held_bytes, step_flops
from commvlm.model.memory import live_bytes
from commvlm.model.spec import EncoderSpec, build_config
from commvlm.train.assemble import model_settings
from commvlm.train.parts import settle_parts
from commvlm.train.recipe import Recipe, load_recipe
from commvlm.train.trainer import StageTrainer

TEXT = Text(front=10, words=30, answer=8)
HERE = Machine("cpu", 1, 8e9, 1e11, 0.4, cuda=False)


def micro(*options: str, **stage: Any) -> Recipe:
    """The micro recipe with one stage of two layers of each encoder."""
    stages = [{"name": "one", "steps": 100, "batch": 4, "trains": ALL, **stage}]
    return load_recipe(
        "micro",
        ["--model.encoders.clip.layers", "[1, 2]", "--model.encoders.dinov2.layers", "[1, 2]", "--data.group", "3",
         "--train.stages", json.dumps(stages), *options],
    )  # fmt: skip


def batch_of(config: Any, images: int, group: int) -> dict[str, Any]:
    """One packed row of the plan's own lengths."""
    front = [1] * TEXT.front + [config.image_token_id] * config.num_image_tokens
    ids = torch.tensor([(front + [5] * TEXT.words * group) * images])
    labels = torch.full_like(ids, -100)
    ends = [(i + 1) * len(front) + (i * group + k + 1) * TEXT.words for i in range(images) for k in range(group)]
    for end in ends:
        labels[0, end - TEXT.answer : end] = 7
    return {
        "input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1])[None],
        "segments": [[len(front), *[TEXT.words] * group]] * images,
        "pixel_values": torch.randn(images, config.vision_config.pixels_per_image),
    }  # fmt: skip


def updates(recipe: Recipe) -> None:
    """Two updates by the stage's own Trainer, from nothing."""
    stage, train = recipe.train.stages[0], recipe.train
    model = build_model(**model_settings(recipe.model), weights="random")
    settle_parts(model, stage.trains)
    model.model.language_model.set_attn_implementation(train.attention)
    if train.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=train.precision == "bf16", report_to="none"
    )
    trainer: Any = StageTrainer(
        model=model, args=arguments, train_dataset=[], method=train.optimizer, trains=stage.trains, decay=0.0, spike=None,
        batch=stage.batch, stopped=Path("stopped.json"), adapted=False,
    )  # type: ignore[arg-type]  # fmt: skip
    optimizer = trainer.create_optimizer()
    at_once = stage.micro_batch or stage.batch
    for _ in range(2):
        for _ in range(stage.batch // at_once):
            batch = batch_of(model.config, at_once, recipe.data.group)
            trainer.training_step(model.train(), batch, num_items_in_batch=torch.tensor(96))
            del batch
        optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        (["--train.precision", "fp32"], {}),
        (["--train.precision", "bf16", "--train.checkpointing", "true"], {"micro_batch": 2}),
        (["--train.precision", "fp32", "--train.optimizer", "muon"], {}),
    ],
    ids=["whole", "checkpointed and accumulated", "muon"],
)
def test_a_plan_is_what_a_run_holds(options, stage):
    """Every tensor of a real run is counted, weights and optimizer among them. Within 10 %; 15 % are promised."""
    recipe = micro(*options, **stage)
    plan = Planner(recipe, HERE, TEXT).plan(recipe.train.stages[0])
    with live_bytes() as count:
        updates(recipe)
    assert plan.memory.total == pytest.approx(count.peak, rel=0.1)
    assert plan.memory.activations > 0.2 * plan.memory.total  # otherwise weights alone would pass


def test_features_that_are_read_cost_no_encoder():
    """The whole difference is the encoders' own forward pass, as `inspect` counts it."""
    stored, looped = (micro(*options) for options in (["--train.features", "somewhere"], []))
    plans = [Planner(recipe, HERE, TEXT).plan(recipe.train.stages[0]) for recipe in (stored, looped)]
    parts = inspect_visual_half(build_config(**model_settings(looped.model)))
    encoders = sum(part.flops for part in parts if part.part == "encoders")
    assert plans[1].flops - plans[0].flops == looped.train.stages[0].batch * encoders > 0
    assert plans[0].memory.total < plans[1].memory.total


def test_checkpointing_costs_one_more_forward_of_the_blocks():
    recipe = micro()
    config = build_config(**model_settings(recipe.model))
    shape = Shape(1, config.num_image_tokens + 10, (30,), 8, packed=True)
    once, again = (
        step_flops(config, Way(frozenset(ALL), checkpointing=checkpointing), shape) for checkpointing in (False, True)
    )
    text: Any = config.text_config
    width, n = text.hidden_size, shape.row
    heads, kv, head = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    weights = width * head * (2 * heads + 2 * kv) + 3 * width * text.intermediate_size
    layer = 2 * n * weights + 4 * n * n * heads * head
    saved = (
        2 * n * width * text.intermediate_size
    )  # torch stops before the block's last product, which nobody needs again
    assert again - once == text.num_hidden_layers * (layer - saved)


def test_logits_and_activations_follow_the_shape():
    config = build_config(**model_settings(micro().model))
    way = Way(frozenset(ALL))
    few, many = (
        held_bytes(
            config, way, Shape(images, config.num_image_tokens + 10, (30,) * 3, images * 24, True), gradients="there"
        )
        for images in (2, 4)
    )
    assert few.gradients == many.gradients > 0
    assert many.activations == pytest.approx(2 * few.activations, rel=0.1)
    padded = held_bytes(config, way, Shape(2, config.num_image_tokens + 10, (30,), 16, False), gradients="there")
    assert padded.total < few.total  # one question in place of three


def test_what_is_counted_leaves_no_trace_in_real_runs(tmp_path):
    """DINOv3 remembers its patches' places between calls."""
    DINOv3ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    ).save_pretrained(tmp_path / "dinov3")
    LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path / "lm")
    encoders = [EncoderSpec("dinov3", str(tmp_path / "dinov3"))]
    config = build_config(encoders, language_model=str(tmp_path / "lm"))
    shape = Shape(1, config.num_image_tokens + 2, (4,), 2, packed=True)
    counted = []
    for _ in range(2):
        counted.append(step_flops(config, Way(frozenset(ALL)), shape))
        model = build_model(encoders, language_model=str(tmp_path / "lm"), weights="random")
        pixels = torch.randn(1, config.vision_config.pixels_per_image)  # type: ignore[union-attr]
        assert type(model.get_image_features(pixels, return_dict=True).last_hidden_state) is torch.Tensor
    assert counted[0] == counted[1] > 0


@pytest.fixture
def quick(monkeypatch):
    """Counts that are quick and known, for what is not about counting: 20 MB an image, a quarter with checkpointing, half
    with bf16 weights; 1 GFLOP an image."""

    def held(config: Any, way: Way, shape: Shape, *, gradients: str) -> Held:
        size = 20e6 * shape.images * (0.25 if way.checkpointing else 1) * (0.5 if way.half else 1)
        return Held(0, 3_000_000 if way.autocast else 0, 0, int(size))

    monkeypatch.setattr(planning, "held_bytes", held)
    monkeypatch.setattr(planning, "step_flops", lambda config, way, shape: 10**9 * shape.images)


@pytest.fixture(scope="module")
def sizes() -> tuple[int, int]:
    """All parameters of the small model, and those that learn."""
    config = build_config(**model_settings(micro().model))
    planner = Planner(micro(), HERE, TEXT)
    found = planner.sizes(Way(frozenset(ALL)))
    model = build_model(**model_settings(micro().model), weights="random")
    assert found.total == sum(p.numel() for p in model.parameters())
    assert config.num_image_tokens == 64
    encoders = sum(p.numel() for p in model.parts()["encoders"].parameters())
    assert found.trained == found.total - encoders
    return found.total, found.trained


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer"),
    [("ddp", 4, None, 8), ("fsdp", 1, 1, 2), ("zero2", 2, 0.5, 3), ("zero3", 0.5, 0.5, 3)],
)
def test_engines_share_out_what_they_say(quick, sizes, engine, weights, gradients, optimizer):
    """Bytes a parameter on each of four GPUs, bf16: FSDP shards fp32, ZeRO shards bf16 and keeps fp32 masters."""
    total, trained = sizes
    recipe = micro("--train.engine", engine, "--train.precision", "bf16")
    memory = Planner(recipe, machine("h100", 4), TEXT).plan(recipe.train.stages[0]).memory
    assert memory.weights == pytest.approx(weights * total, abs=8)
    assert memory.optimizer == pytest.approx(optimizer * trained, abs=8)
    if gradients is None:
        assert memory.gathered == 4 * trained  # DDP's buckets
        assert memory.copies > 0
    else:
        assert memory.gradients == pytest.approx(gradients * trained, abs=8)
        assert memory.copies == 0
    assert memory.overhead > 1.8e9


def test_muon_keeps_one_state_of_matrices_and_steps_in_room_of_its_own(quick):
    """By hand: 8 bytes a parameter, 4 of those that are matrices and no words; a step on large matrices, five copies."""
    plain, muon = (Planner(micro("--train.optimizer", name), HERE, TEXT) for name in ("adamw", "muon"))
    model = build_model(**model_settings(plain.recipe.model), weights="random")
    settle_parts(model, ALL)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in tables]
    ours, theirs = (p.plan(p.recipe.train.stages[0]).memory for p in (muon, plain))
    assert theirs.optimizer - ours.optimizer == 4 * sum(p.numel() for p in matrices)
    few = Planner(micro("--train.optimizer", "muon", batch=1), HERE, Text(front=0, words=1, answer=1))
    few.held = lambda *_: Held(0, 0, 0, 0)
    own = few.plan(few.recipe.train.stages[0]).memory
    most = max(sum(p.numel() for p in matrices if p.shape == shape) for shape in {p.shape for p in matrices})
    assert own.optimizer - ours.optimizer == 4 * 5 * most


def test_adapters_learn_little_and_4_bits_hold_less(quick):
    plans = {}
    for bits in (16, 4):
        lora = {"rank": 4, "bits": bits}
        recipe = micro(lora=lora, trains={"project": 1e-3, "language_model": 1e-3})
        planner = Planner(recipe, machine("h100", 1), TEXT)
        plans[bits] = (planner, planner.plan(recipe.train.stages[0]).memory)
    planner, memory = plans[16]
    assert memory.optimizer < 0.2 * Planner(micro(), HERE, TEXT).plan(micro().train.stages[0]).memory.optimizer
    beside = next(iter([planner.sizes(planner._way(planner.recipe.train.stages[0], planner.recipe.train))])).beside
    assert memory.weights - plans[4][1].weights == 4 * beside - round(beside * 4.127 / 8)


def test_hours_are_flops_by_speed(quick):
    recipe = micro("--train.engine", "fsdp")
    one, two = (Planner(recipe, machine("h100", count, 0.5), TEXT).plan(recipe.train.stages[0]) for count in (1, 2))
    assert one.flops == two.flops
    assert one.hours == pytest.approx(100 * one.flops / (0.5 * 989.4e12) / 3600)
    assert two.hours == pytest.approx(one.hours / 2)


def test_what_would_fit_is_said_alone_or_together(quick):
    """By hand: 80 MB of activations, 20 with checkpointing, 20 with one image at once; optimizer's 8 bytes a parameter."""
    recipe = micro("--train.precision", "fp32")
    stage = recipe.train.stages[0]
    planner = Planner(recipe, HERE, TEXT)
    need = planner.plan(stage).memory.total
    ways = dict(remedies(planner, stage))
    assert list(ways) == ["train.checkpointing true", "train.stages.one.micro_batch 1", "train.stages.one.lora.rank 16"]
    assert ways["train.checkpointing true"] == ways["train.stages.one.micro_batch 1"] == 8e9 - (need - 60e6)
    assert 8e9 - need < ways["train.stages.one.lora.rank 16"] < 8e9 - 80e6
    tight = dataclasses.replace(HERE, memory=need - 61e6)
    together = [(says, left) for says, left in remedies(Planner(recipe, tight, TEXT), stage) if " and " in says]
    assert [says for says, _ in together] == ["train.checkpointing true and train.stages.one.micro_batch 1"]
    assert together[0][1] > 0


def test_the_command_refuses_with_exit_code_2_and_a_list(quick, monkeypatch, capsys):
    argv = ["plan", "micro", "--gpu", "tiny", "--data.group", "3", "--train.precision", "fp32"]
    monkeypatch.setitem(GPUS, "tiny", Gpu("tiny", 1.05e9, 1e12, 1e12))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "activations" in out
    error, *ways = err.strip().splitlines()
    assert error.startswith("commvlm: error: stage 'align' needs 1.")
    assert error.endswith("of 1.1 GB on each tiny; it cannot fit")
    assert any("train.checkpointing true:" in way and "GB" in way for way in ways)


def test_the_command_in_json(quick, capsys):
    assert main(["plan", "micro", "--gpu", "h100", "--data.group", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in plan["stages"]] == ["align", "instruct"]
    first = plan["stages"][0]
    assert first["fits"]
    assert first["memory"]["total"] == sum(v for k, v in first["memory"].items() if k != "total")
    assert plan["would_change"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "h1000"], "did you mean 'h100'"),
        (["--gpus", "3"], "batch 4 cannot be shared by 3 processes evenly"),
        (["--answer", "61"], "--answer 61 is more than --words 60"),
    ],
)
def test_slips_are_one_line(quick, options, said, capsys):
    assert main(["plan", "micro", *options]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_the_papers_hours_stand_beside_its_own_run_alone():
    stage = SimpleNamespace(stage=SimpleNamespace(name="stage1"))

    def hours(recipe: str, gpu: str, count: int) -> float | None:
        planner: Any = SimpleNamespace(recipe=SimpleNamespace(name=recipe), on=SimpleNamespace(name=gpu, count=count))
        return paper_hours(planner, stage)  # type: ignore[arg-type]

    assert hours("comm-7b", "a800-80", 8) == 100
    assert hours("comm-7b", "h100", 8) is hours("comm-7b", "a800-80", 4) is hours("micro", "a800-80", 8) is None


@pytest.mark.slow
def test_the_papers_run(capsys):
    """Every process with the whole model cannot be; FSDP fits eight A800, in fewer hours than the paper's."""
    assert main(["plan", "comm-7b", "--gpu", "a800-80", "--gpus", "8"]) == 2
    out, err = capsys.readouterr()
    assert "the paper                100            20" in out
    assert "train.engine fsdp: fits" in err
    assert main(["plan", "comm-modern-4b", "--gpu", "h100", "--gpus", "8"]) == 0
