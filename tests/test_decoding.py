"""Shared prefixes: answers token for token those of asking one by one, whatever the language model; nothing read twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import small_options
from test_model_tiny import comm, comm_specs, enliven, pixels
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from commvlm.app.answering import Answerer
from commvlm.app.decoding import Decoder, Prompt, Row
from commvlm.app.growing import Sampling
from commvlm.evaluate.tasks import task_named
from commvlm.model import CommForConditionalGeneration, build_model
from commvlm.train.assemble import assemble
from commvlm.train.recipe import load_recipe
from commvlm.train.sources import named_examples
from commvlm.train.whole import save_whole

SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "grouped": LlamaConfig(**WIDE, num_key_value_heads=2),
    "sliding": MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=8),
    "alibi": BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4),
}
SHARED = ("llama", "qwen3", "gpt2", "grouped")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("decoding")


@pytest.fixture(scope="module", params=[*SHARED, "sliding", "alibi"])
def model(request, root) -> CommForConditionalGeneration:
    if request.param in OTHERS:
        folder = root / request.param
        torch.manual_seed(3)
        enliven(AutoModelForCausalLM.from_config(OTHERS[request.param])).save_pretrained(folder)
        made = build_model(comm_specs(root), language_model=str(folder))
        enliven(made.model.vision_tower.branches)
    else:
        made = comm(root, language_model=request.param)
    made.name = request.param  # type: ignore[assignment]
    return made.eval()


def questions(model: CommForConditionalGeneration) -> tuple[list[Prompt], torch.Tensor]:
    """Three images, three questions each of 1 to 7 ids behind one beginning; and each prompt's pixels."""
    rows = torch.cat([pixels(model, seed=k) for k in range(3)])
    with torch.no_grad():
        features = list(model.get_image_features(rows).pooler_output)
    generator = torch.Generator().manual_seed(5)
    start = [7, 8, *[model.config.image_token_id] * model.config.num_image_tokens, 9]
    prompts = [
        Prompt(torch.tensor(start + torch.randint(10, 60, (length,), generator=generator).tolist()), image, tokens)
        for image, tokens in enumerate(features)
        for length in (1, 4, 7)
    ]
    return prompts, rows.repeat_interleave(3, dim=0)


@torch.inference_mode()
def one_by_one(model, prompts, rows, *, most: int = 9) -> list[list[int]]:
    said = []
    for prompt, row in zip(prompts, rows, strict=True):
        ids = model.generate(
            input_ids=prompt.ids[None], attention_mask=torch.ones_like(prompt.ids)[None], pixel_values=row[None],
            max_new_tokens=most, do_sample=False,
        )  # fmt: skip
        new = ids[0, len(prompt.ids) :].tolist()
        ends = model.generation_config.eos_token_id
        said.append(new[: new.index(ends)] if ends in new else new)
    return said


def test_answers_are_those_of_asking_one_by_one(model):
    """With an end token that some answers say early, some late and some never."""
    prompts, rows = questions(model)
    model.generation_config.eos_token_id = None
    free = one_by_one(model, prompts, rows)
    assert len({tuple(answer) for answer in free}) > 5, "the answers must differ for this to say anything"
    ends = sorted({token for answer in free for token in answer[1:]}, key=lambda t: -sum(t in a for a in free))
    model.generation_config.eos_token_id = ends[0]
    expected = one_by_one(model, prompts, rows)
    assert len({len(answer) for answer in expected}) > 1
    decoder = Decoder(model, max_new_tokens=9, pad=0)
    assert decoder(prompts) == expected
    assert decoder.shares_prefixes == (model.name in SHARED)
    assert [decoder([prompt])[0] for prompt in prompts] == expected
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    assert decoder([prompts[k] for k in order]) == [expected[k] for k in order]


def test_the_prefix_is_read_once_an_image(model):
    if model.name not in SHARED:
        pytest.skip("this family is asked whole prompts")
    model.generation_config.eos_token_id = None
    prompts, _ = questions(model)
    read: list[tuple[int, int]] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    Decoder(model, max_new_tokens=4, pad=0)(prompts)
    handle.remove()
    prefix = 3 + model.config.num_image_tokens
    assert read[0] == (3, prefix)
    assert read[1] == (9, 7)
    assert read[2:] == [(9, 1)] * 3


def test_finished_answers_leave_the_batch(root):
    model = comm(root, language_model="llama").eval()
    prompts, rows = questions(model)
    model.generation_config.eos_token_id = None
    free = one_by_one(model, prompts, rows)
    first = free[0][0]
    model.generation_config.eos_token_id = first
    widths: list[int] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    said = Decoder(model, max_new_tokens=9, pad=0)(prompts)
    handle.remove()
    assert said == one_by_one(model, prompts, rows)
    assert said[0] == []
    assert widths[2] == sum(answer[0] != first for answer in free) < 9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_join_and_leave_between_steps_say_what_they_say_alone(family, root):
    """Joined at any step, in any order, beside rows that are cut short; no place is kept that no row uses."""
    if family in OTHERS:
        enliven(AutoModelForCausalLM.from_config(OTHERS[family])).save_pretrained(root / "joining")
        model = build_model(comm_specs(root), language_model=str(root / "joining")).eval()
    else:
        model = comm(root, language_model=family).eval()
    model.generation_config.eos_token_id = None
    prompts, rows = questions(model)
    free = one_by_one(model, prompts, rows, most=12)
    model.generation_config.eos_token_id = next(token for token in free[4][1:7] if token not in free[7])
    alone = one_by_one(model, prompts, rows, most=12)
    decoder = Decoder(model, max_new_tokens=12, pad=0)
    growing, asked = decoder.start(), [Row(prompt, most=3 + k) for k, prompt in enumerate(prompts)]
    joins = {0: [8, 0], 1: [3], 2: [6, 1, 7], 5: [2], 6: [4], 9: [5]}
    for step in range(40):
        if step in joins:
            decoder.begin(growing, [asked[k] for k in joins[step]])
        if step == 4:
            growing.leave([asked[7]])
        if growing.rows:
            growing.step()
            assert not growing.rows or growing._mask.any(dim=0).all()
    assert asked[7].finish == "left"
    for k, row in enumerate(asked):
        assert row.said == (alone[k][: len(row.said)] if k == 7 else alone[k][: row.most])
        assert row.finish in ("stop", "length", "left")
    assert {row.finish for row in asked} == {"stop", "length", "left"}


def test_sampling_follows_its_seed_whatever_is_beside_it(root):
    model = comm(root, language_model="llama").eval()
    model.generation_config.eos_token_id = None
    prompts, _ = questions(model)
    decoder = Decoder(model, max_new_tokens=8, pad=0)

    def drawn(seed: int, *, top_p: float = 1.0, temperature: float = 3.0, beside: tuple[int, ...] = ()) -> list[int]:
        sampling = Sampling(temperature, top_p, torch.Generator().manual_seed(seed))
        row, growing = Row(prompts[4], 8, sampling), decoder.start()
        decoder.begin(growing, [*(Row(prompts[k], 8) for k in beside), row])
        while growing.rows:
            growing.step()
        return row.said

    greedy = decoder([prompts[4]])[0]
    assert drawn(1) == drawn(1, beside=(0, 3, 8))
    assert len({tuple(drawn(seed)) for seed in range(6)}) > 3
    assert drawn(1, top_p=1e-6) == drawn(1, top_p=0) == drawn(2, temperature=1e-4) == greedy
    assert drawn(2, temperature=1e-320) == drawn(2, temperature=1e-38) == greedy


def test_top_p_leaves_the_likeliest_and_draws_among_them():
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in ((0.4, {1}), (0.6, {1, 2}), (0.9, {0, 1, 2})):
        said = Counter(Sampling(1.0, top_p, generator).pick(logits) for _ in range(800))
        assert set(said) == kept
        if top_p == 0.6:
            assert abs(said[1] / 800 - 5 / 8) < 0.07


def test_settings_of_the_generation_config_count(root):
    """Forbidden ids are never said; penalties go through the library's own code."""
    model = comm(root, language_model="llama").eval()
    model.generation_config.eos_token_id = None
    prompts, rows = questions(model)
    usual = Decoder(model, max_new_tokens=6, pad=0)(prompts)
    model.generation_config.suppress_tokens = [model.config.image_token_id, usual[0][0], usual[3][1]]
    kept = Decoder(model, max_new_tokens=6, pad=0)(prompts)
    assert kept != usual
    assert kept == one_by_one(model, prompts, rows, most=6)
    model.generation_config.repetition_penalty = 1.7
    decoder = Decoder(model, max_new_tokens=6, pad=0)
    assert not decoder.shares_prefixes
    assert decoder(prompts) != kept
    assert decoder(prompts) == one_by_one(model, prompts, rows, most=6)


def test_prompts_that_begin_apart_are_asked_whole(root):
    model = comm(root, language_model="llama").eval()
    model.generation_config.eos_token_id = None
    prompts, rows = questions(model)
    other = Prompt(torch.cat([torch.tensor([11]), prompts[0].ids]), 0, prompts[0].features)
    mixed = [other, *prompts[1:]]
    assert Decoder(model, max_new_tokens=6, pad=0)(mixed) == one_by_one(model, mixed, rows, most=6)


def test_prompts_without_an_image(root):
    model = comm(root, language_model="qwen3").eval()
    model.generation_config.eos_token_id = None
    prompts = [Prompt(torch.tensor([5, 6, 7, *range(10, 10 + n)]), None, None) for n in (1, 3, 2)]
    with torch.inference_mode():
        expected = [
            model.generate(input_ids=p.ids[None], max_new_tokens=5, do_sample=False)[0, len(p.ids) :].tolist()
            for p in prompts
        ]
    assert Decoder(model, max_new_tokens=5, pad=0)(prompts) == expected


# --- on the micro world's test split ---


@pytest.fixture(scope="module")
def micro(world, tmp_path_factory) -> tuple[Path, dict]:
    """The micro recipe's model, its projection loud, and the test split's questions, instructed, by task."""
    recipe = load_recipe("micro", small_options(world))
    model, processor = assemble(load_recipe("micro").model)
    with torch.no_grad():
        model.model.multi_modal_projector.weight.mul_(30)
    folder = tmp_path_factory.mktemp("micro") / "model"
    save_whole(folder, model, processor)
    asked: dict[str, list] = {}
    for examples in named_examples(recipe.evaluate.sources, world).values():
        for example in examples:
            asked.setdefault(example.task, []).append(task_named(example.task).instruct(example))
    return folder, asked


def test_batch_1_is_batch_16_on_the_test_split(micro):
    folder, asked = micro
    one, many = (Answerer(folder, max_new_tokens=8, batch_size=size) for size in (1, 16))
    examples = [example for task in ("rec", "reg", "pope", "vqa", "caption") for example in asked[task][::2]]
    said = many(examples)
    assert said == one(examples)
    assert len(set(said)) > 20


def test_an_image_is_encoded_once_for_all_tasks(micro):
    folder, asked = micro
    answer = Answerer(folder, max_new_tokens=2, batch_size=16)
    seen: list[int] = []
    answer.model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    for task in ("pope", "rec", "vqa"):
        answer(asked[task])
    assert sum(seen) == len({e.image for task in ("pope", "rec", "vqa") for e in asked[task]}) == 12
    answer.forget()
    answer(asked["pope"][:1])
    assert sum(seen) == 13
    assert json.loads((folder / "config.json").read_text())["model_type"] == "comm"
