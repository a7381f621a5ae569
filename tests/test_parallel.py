"""Several processes: the same gradients and curve as one, the same data in the same order, and none waits for ever."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_options
from ranks import (
    KillAtFile,
    KillAtStep,
    Slices,
    kill_in_save,
    spy_on_data,
    spy_on_gradients,
    spy_on_images,
    spy_on_shards,
    start,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations import deepspeed

from commvlm.data.collate import Collator
from commvlm.data.example import Example, Turn
from commvlm.model import vision
from commvlm.model.stored_pixels import stored_pixels
from commvlm.train.assemble import assemble, load_tokenizer, located
from commvlm.train.features import store_recipe
from commvlm.train.imageless import STAND_IN
from commvlm.train.keys import RecipeError
from commvlm.train.parts import settle_parts
from commvlm.train.recipe import Stage
from commvlm.train.run import check, train
from commvlm.train.sharded import check_sharded, gathered
from commvlm.train.stage import arguments, every_branch, shared_out
from commvlm.train.trainer import checkpoints

TIMES = ("seconds", "tokens_per_second")
STAGE = {
    "name": "only", "steps": 6, "batch": 4, "warmup": 0.0,
    "trains": {"merge": 1e-3, "align": 1e-3, "project": 1e-3, "language_model": 5e-4},
}  # fmt: skip


def command(world: Path, out: Path, *options: str, **stage: Any) -> list[str]:
    fixed = ["--train.precision", "fp32", "--train.log_every", "1", "--train.attention", "sdpa"]
    options = (*fixed, "--train.visual_scale", "null", *options)
    return ["train", "micro", "--out", str(out), *small_options(world, *options, stages=[{**STAGE, **stage}])]


def log_of(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in log_of(out)]


def run(argv: list[str], folder: Path, **kwargs: Any) -> Path:
    ranks = start(argv, folder, **kwargs)
    assert set(ranks.wait()) == {0}, ranks.lines()
    return folder


def drawn(folder: Path, rank: int) -> list[int]:
    return [int(line) for line in (folder / f"drawn-{rank}.txt").read_text().split()]


def untied(folder: Path) -> Path:
    """The micro world's language model with a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(located("micro:lm"))
    assert model.config.tie_word_embeddings
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1.1)
    model.save_pretrained(folder)
    load_tokenizer("micro:lm").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(world, tmp_path_factory) -> Path:
    """A straight run of one process."""
    folder = tmp_path_factory.mktemp("one")
    return run(command(world, folder / "run"), folder, spies=[spy_on_gradients])


@pytest.fixture(scope="module")
def two(world, tmp_path_factory) -> Path:
    """A straight run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    return run(command(world, folder / "run"), folder, count=2, spies=[spy_on_gradients])


class TestOneGlobalBatch:
    @pytest.mark.parametrize(
        "way", ["accumulated", "two processes", pytest.param("two processes, accumulated", marks=pytest.mark.slow)]
    )
    def test_gives_the_same_gradient_and_curve(self, world, one, two, tmp_path, way):
        if way == "two processes":
            folder = two
        else:
            argv = command(world, tmp_path / "run", micro_batch=1)
            folder = run(argv, tmp_path, count=1 + way.startswith("two"), spies=[spy_on_gradients])
        expected, found = (torch.load(f / "gradients-0.pt", weights_only=True) for f in (one, folder))
        assert set(found) == set(expected)
        assert max(float(g.abs().max()) for g in expected.values()) > 0.1
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
        assert losses(folder / "run") == pytest.approx(losses(one / "run"), rel=2e-5)
        assert len(losses(folder / "run")) == 6

    def test_is_shared_out_evenly_or_refused(self, small):
        stage = Stage("s", 1, 64, {}, micro_batch=8)
        shares = {count: shared_out(stage, count) for count in (1, 2, 8, 16, 64)}
        assert shares == {1: (8, 8), 2: (8, 4), 8: (8, 1), 16: (4, 1), 64: (1, 1)}
        assert shared_out(Stage("s", 1, 48, {}, micro_batch=6), 4) == (6, 2)
        assert shared_out(Stage("s", 1, 40, {}, micro_batch=8), 4) == (5, 2)
        with pytest.raises(RecipeError, match="stage 'align': batch 2 cannot be shared by 4 processes evenly"):
            check(small(), count=4)


class TestTheOrderOfData:
    def test_is_that_of_one_process_and_goes_on_on_another_number(self, world, one, tmp_path):
        """Two processes until one is killed behind the first checkpoint, then one process: every place once, in order."""
        out, first, then = tmp_path / "run", tmp_path / "first", tmp_path / "then"
        ranks = start(command(world, out), first, count=2, spies=[spy_on_data, KillAtStep(5, rank=1)])
        assert ranks.wait() == [2, -9]
        assert ranks.lines()[-1].startswith("commvlm: error: another process of this run ended"), ranks.lines()
        assert not any("Traceback" in line for line in ranks.lines())
        halves = [drawn(first, rank) for rank in (0, 1)]
        for rank, half in enumerate(halves):  # steps of 4: two for each process
            assert half[:8] == [4 * step + 2 * rank + k for step in range(4) for k in range(2)]
        run(command(world, out), then, spies=[spy_on_data])
        assert drawn(then, 0) == list(range(12, 24))
        assert losses(out) == pytest.approx(losses(one / "run"), rel=2e-5)


class TestFullySharded:
    """FSDP2 through the library's Trainer, on CPUs."""

    def test_shards_every_block_and_goes_on_after_a_kill(self, world, two, tmp_path):
        out, argv = tmp_path / "run", command(world, tmp_path / "run", "--train.engine", "fsdp")
        ranks = start(argv, tmp_path, count=2, spies=[KillAtStep(5, rank=1)])
        assert ranks.wait()[1] == -9
        assert [p.name for p in (out / "stages" / "only").iterdir()] == ["checkpoint-3"]
        run(argv, tmp_path, count=2, spies=[spy_on_shards])
        shards = [json.loads((tmp_path / f"shards-{rank}.json").read_text()) for rank in (0, 1)]
        for shard in shards:
            assert {"CLIPEncoderLayer", "Dinov2Layer", "Qwen3DecoderLayer", "CommForConditionalGeneration"} <= set(
                shard["units"]
            )
            assert shard["held"] == pytest.approx(shard["all"] / 2, rel=0.02)
        assert losses(out) == pytest.approx(losses(two / "run"), rel=2e-5)
        assert log_of(out)[-1]["layer_weights"] == log_of(two / "run")[-1]["layer_weights"]
        found, expected = (load_file(run / "model" / "model.safetensors") for run in (out, two / "run"))
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3, msg=lambda t, n=name: f"{n}: {t}")

    @pytest.mark.slow  # what it is about is tested by itself in test_loss_shared.py
    @pytest.mark.parametrize("tied", [True, False])
    def test_makes_a_loss_in_slices_with_other_numbers_of_supervised_tokens(self, world, one, tmp_path, tied):
        """Each slice is a call of the head, which puts its weights together: as many in every process, or they hang."""
        options, alone, rows = [], one, 24
        if not tied:
            options, alone, rows = ["--model.language_model", str(untied(tmp_path / "lm"))], tmp_path / "alone", 7
            run(command(world, alone / "run", *options), alone, spies=[spy_on_gradients])
        argv = command(world, tmp_path / "run", *options, "--train.engine", "fsdp")
        run(argv, tmp_path, count=2, spies=[spy_on_gradients, Slices(rows)])
        supervised = [[int(n) for n in (tmp_path / f"supervised-{r}.txt").read_text().split()] for r in (0, 1)]
        calls = [{-(-n // rows) for n in pair} for pair in zip(*supervised, strict=True)]
        assert any(len(pair) == 2 for pair in calls), supervised
        expected, found = (torch.load(f / "gradients-0.pt", weights_only=True) for f in (alone, tmp_path))
        assert set(found) == set(expected)
        assert any("lm_head" in name for name in found) != tied
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
        assert losses(tmp_path / "run") == pytest.approx(losses(alone / "run"), rel=2e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("merge", ["lln-layerscale", "mean"])  # with weights behind the encoders, and without any
    def test_in_bfloat16_is_near_ddp_and_its_loss_is_not_rounded(self, world, small, tmp_path, merge):
        """Encoders in the loop, and their features from a store in their place."""
        only = ["--train.precision", "bf16"]
        for encoder, align in (("clip", "identity"), ("dinov2", "identity")):
            only += [f"--model.encoders.{encoder}.merge", merge, f"--model.encoders.{encoder}.align", align]
        store_recipe(small(*only), tmp_path / "features", kept="bf16")
        found = {}
        for name, engine, features in (("ddp", "ddp", []), ("fsdp", "fsdp", []), ("stored", "fsdp", ["features"])):
            given = ["--train.features", str(tmp_path / "features")] if features else []
            argv = command(world, tmp_path / name, *only, *given, "--train.engine", engine)
            run(argv, tmp_path / f"{name}-said", count=2)
            found[name] = losses(tmp_path / name)
        for name in ("fsdp", "stored"):
            assert found[name][0] == pytest.approx(
                found["ddp"][0], rel=0.015
            )  # FSDP's residual stream is in bfloat16 too
            assert found[name] == pytest.approx(found["ddp"], rel=0.08)
            assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in found[name])

    def test_zero_3_is_over_when_the_model_is_gathered(self, small):
        """While the library knows of it, every model that is made is shared out, by a package that is not here."""

        class Zero3:
            is_zero3 = staticmethod(lambda: True)

        model, _ = assemble(small().model)
        state, keeps = model.state_dict(), Zero3()
        deepspeed.set_hf_deepspeed_config(keeps)
        accelerator = SimpleNamespace(get_state_dict=lambda engine: state)
        trainer = SimpleNamespace(is_deepspeed_enabled=True, deepspeed=None, model=model, accelerator=accelerator)
        try:
            assert deepspeed.is_deepspeed_zero3_enabled()
            found = gathered(trainer, None)
        finally:
            deepspeed.unset_hf_deepspeed_config()
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in state.items())

    def test_that_did_not_happen_is_an_error(self):
        with pytest.raises(RuntimeError, match=r"FSDP did not shard 2 parameters \(first: weight"):
            check_sharded(torch.nn.Linear(2, 2))


class TestBatchesWithoutAnImage:
    @pytest.fixture(scope="class")
    def texts(self, world, tmp_path_factory) -> list[str]:
        """Options for dialogues without an image, half of all draws beside questions about images."""
        path = tmp_path_factory.mktemp("texts") / "texts.json"
        turns = [("human", "say it"), ("gpt", "a red square")]
        said = [
            {"id": f"{k}", "conversations": [{"from": who, "value": what} for who, what in turns]} for k in range(9)
        ]
        path.write_text(json.dumps(said))
        sources = [
            {"name": "texts", "format": "llava", "images": "images", "files": {"conversations": str(path)}},
            {"name": "pope", "format": "pope", "images": "images", "files": {"questions": "train/pope_random.json"}},
        ]
        return ["--data.group", "1", "--data.sources", json.dumps(sources)]

    def test_hang_nobody(self, world, small, texts, tmp_path):
        """In some updates one process has no image, in some none has any; encoders in the loop, and features from a store."""
        store_recipe(small("--train.precision", "fp32", *texts), tmp_path / "features", kept="fp32")
        stored = ["--train.features", str(tmp_path / "features")]
        for name, count, engine, more in (("one", 1, "ddp", []), ("two", 2, "fsdp", []), ("stored", 2, "fsdp", stored)):
            argv = command(world, tmp_path / name, *texts, *more, "--train.engine", engine, batch=2, steps=6)
            run(argv, tmp_path / f"{name}-said", count=count, spies=[spy_on_images])
        for name in ("two", "stored"):
            assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
            seen = [(tmp_path / f"{name}-said" / f"images-{rank}.txt").read_text().split()[:6] for rank in (0, 1)]
            assert len({(a, b) for a, b in zip(*seen, strict=True) if a != b}) >= 1, seen

    @pytest.mark.parametrize("kept", [None, "fp32", "bf16"])  # encoders in the loop, and their features from a store
    @pytest.mark.parametrize(("layout", "attention"), [("mask", "sdpa"), ("joined", "shared-prefix")])
    def test_get_a_row_that_teaches_nothing(self, small, tmp_path, monkeypatch, layout, attention, kept):
        model, processor = assemble(small().model)
        shown: Any = processor.image_processor
        grey = (1, sum(3 * e["size"] ** 2 for e in shown.encoders)), torch.float32
        if kept is not None:
            tower = model.model.vision_tower
            store_recipe(small(), tmp_path, kept=kept)
            shown = stored_pixels(tmp_path, tower, shown)
            like = torch.cat([s.rows([next(iter(s.places))]).flatten() for s in shown.stores])
            grey = (1, 1, len(like)), torch.bfloat16 if kept == "bf16" else torch.float32
            monkeypatch.setattr(vision, "stream_layers", None)  # no encoder runs
        settle_parts(model, dict.fromkeys(("merge", "align", "project", "language_model"), 1e-3))
        tokens = model.config.num_image_tokens
        model.model.language_model.set_attn_implementation(attention)
        collator = Collator(processor.tokenizer, shown, tokens, layout=layout)
        groups = [[Example(f"t:{k}", "dialogue", None, (Turn("say", "red " * k),))] for k in (3, 1)]
        plain, with_grey = collator(groups), every_branch(collator, processor)(groups)
        assert (with_grey["pixel_values"].shape, with_grey["pixel_values"].dtype) == grey
        assert with_grey.pop(STAND_IN)
        found = []
        for batch in (plain, with_grey):
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            found.append(
                (float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            )
        (loss, gradients), (other, others) = found
        assert other == pytest.approx(loss, rel=1e-6)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(others) > set(gradients)
        for name, gradient in others.items():
            expected = gradients.get(name, torch.zeros(()).expand_as(gradient))
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)

    def test_leave_batch_norms_as_they_are(self, small, world, texts, tmp_path):
        """Text alone moves no statistics of images; a batch with images does."""
        merges = [f"--model.encoders.{name}.merge=conv-layerscale" for name in ("clip", "dinov2")]
        sources = json.loads(texts[-1])
        for source in sources:
            only = ["--data.group", "1", "--data.sources", json.dumps([source]), "--train.visual_scale", "null"]
            stages = [{"name": "only", "steps": 2, "batch": 2, "trains": {"merge": 1e-3, "project": 1e-3}}]
            train(small(*merges, *only, stages=stages), tmp_path / source["name"])
            found = load_file(tmp_path / source["name"] / "model" / "model.safetensors")
            counted = {int(value) for name, value in found.items() if name.endswith("num_batches_tracked")}
            moved = [bool(value.any()) for name, value in found.items() if name.endswith("running_mean")]
            assert (counted, any(moved)) == (({0}, False) if source["name"] == "texts" else ({2}, True))


def whole(out: Path) -> None:
    """Nothing that a killed run left under a good name is half of anything."""
    for stage in (out / "stages").glob("*"):
        for found in checkpoints(stage)[-1:]:
            assert load_file(found / "model.safetensors")
            for name in ("optimizer.pt", "scheduler.pt"):
                assert torch.load(found / name, weights_only=True)
            assert json.loads((found / "trainer_state.json").read_text())["global_step"] > 0
        assert len(checkpoints(stage)) <= 3  # two are kept, and one on its way
    for model in (*out.glob("stages/*/model"), *out.glob("model")):
        assert load_file(model / "model.safetensors")
    if (out / "run.json").exists():
        assert json.loads((out / "run.json").read_text())["model"] == "model"


def killed_and_resumed(world: Path, folder: Path, *, count: int, kills: int, seed: int) -> dict[str, int]:
    """Runs that are killed at random moments until so many kills have hit; each ends as a straight run does, to the bit."""
    stages = [{**STAGE, "name": "first", "steps": 6}, {**STAGE, "name": "second", "steps": 6, "batch": 2}]
    options = ["--train.stages", json.dumps(stages), "--train.save_every", "2"]
    began = time.monotonic()
    run(command(world, folder / "straight", *options), folder / "straight-said", count=count)
    lasts, rng, hit, runs = time.monotonic() - began, random.Random(seed), {"clock": 0, "save": 0, "file": 0}, 0
    while True:
        out, again = folder / f"run-{runs}", folder / "said"
        argv = command(world, out, *options)
        kind = list(hit)[sum(hit.values()) % 3] if sum(hit.values()) < kills else "none"
        victim = rng.randrange(count)
        spies = [KillAtFile(out, rng.randrange(1, 120))] if kind == "file" else []
        ranks = start(argv, again, count=count, spies=spies)
        if kind == "clock":
            time.sleep(rng.uniform(0.1, lasts))
            ranks.kill(victim)
        if kind == "save":
            kill_in_save(ranks, out / "stages", rng, victim, skip=rng.randrange(3))
        codes = ranks.stop_others()
        whole(out)
        if set(codes) == {0}:
            assert log_of(out) == log_of(folder / "straight")
            for file in (folder / "straight" / "model").iterdir():
                assert (out / "model" / file.name).read_bytes() == file.read_bytes()
            runs += 1
        elif kind != "none":
            assert -9 in codes, (codes, ranks.lines())
            assert set(codes) <= {-9, -15, -6, 0, 2}, (codes, ranks.lines())
            hit[kind] += 1
        if kind == "none":
            assert set(codes) == {0}, ranks.lines()
            return hit | {"runs": runs}


class TestAProcessThatIsKilled:
    def test_at_any_moment_ends_as_if_it_had_not_been(self, world, tmp_path):
        hit = killed_and_resumed(world, tmp_path, count=1, kills=3, seed=1)
        assert hit["save"] >= 1

    @pytest.mark.slow
    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("count", [1, 2])
    def test_kill_twenty_times(self, world, tmp_path, count):
        hit = killed_and_resumed(world, tmp_path, count=count, kills=20, seed=count)
        print(f"{count} processes: {hit}")
        assert sum(hit[kind] for kind in ("clock", "save", "file")) == 20


def test_a_process_alone_takes_one_gpu_however_many_it_sees(small, tmp_path, monkeypatch):
    """The library's DataParallel would take all of them, and as many times the images an update."""

    def eight(self):
        self._n_gpu = 8
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(eight))
    recipe = small()
    made = arguments(recipe, recipe.train.stages[0], None, tmp_path)  # type: ignore[arg-type]
    assert made.n_gpu == 1
    assert made.train_batch_size == recipe.train.stages[0].batch
