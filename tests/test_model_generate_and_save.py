"""Answers, files and resuming: generation, save and load, the Trainer's way of loading, pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_model_tiny import comm, comm_specs, language_model_folder, pixels, prompt, tiny_tokenizer
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedConfig, Trainer, TrainingArguments, pipeline

from commvlm.model import CommForConditionalGeneration, build_model, build_processor

FAMILIES = ["llama", "qwen3"]
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}"
    "{{ '<image> ' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, root) -> CommForConditionalGeneration:
    return comm(root, language_model=request.param)


def by_hand(model, ids: torch.Tensor, row: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding without a cache and without `generate`."""
    for _ in range(count):
        logits = model(input_ids=ids, pixel_values=row).logits[:, -1]
        logits[:, model.config.image_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def generate(model, **inputs) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)


def test_generation_with_and_without_cache_is_greedy_decoding_by_hand(model):
    ids, row = prompt(model), pixels(model)
    with torch.no_grad():
        truth = by_hand(model, ids, row, 6)
    assert torch.equal(generate(model, input_ids=ids, pixel_values=row), truth)
    assert torch.equal(generate(model, input_ids=ids, pixel_values=row, use_cache=False), truth)
    other = generate(model, input_ids=ids, pixel_values=pixels(model, seed=4) * 3)
    assert not torch.equal(other, truth)  # the image has a say


def test_encoders_run_once_per_answer(model):
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generate(model, input_ids=prompt(model), pixel_values=pixels(model))
    handle.remove()
    assert len(calls) == 1


def test_a_left_padded_batch_answers_as_singles_do(model):
    rows = pixels(model, 3)
    prompts = [prompt(model, before=before, after=after, seed=before) for before, after in ((1, 1), (4, 2), (2, 9))]
    width = max(ids.shape[1] for ids in prompts)
    padded = torch.zeros(3, width, dtype=torch.long)
    mask = torch.zeros(3, width, dtype=torch.long)
    for index, ids in enumerate(prompts):
        padded[index, width - ids.shape[1] :] = ids
        mask[index, width - ids.shape[1] :] = 1
    answers = generate(model, input_ids=padded, attention_mask=mask, pixel_values=rows)[:, width:]
    for index, ids in enumerate(prompts):
        single = generate(model, input_ids=ids, pixel_values=rows[index : index + 1])[:, ids.shape[1] :]
        assert torch.equal(answers[index : index + 1], single)


def test_several_answers_and_two_images_in_one_prompt(model):
    two = torch.cat([prompt(model), prompt(model, seed=1)], dim=1)
    rows = pixels(model, 2)
    swapped = generate(model, input_ids=two, pixel_values=rows.flip(0) * 3)
    straight = generate(model, input_ids=two, pixel_values=rows * 3)
    assert not torch.equal(swapped, straight)
    beams = model.generate(
        input_ids=two, pixel_values=rows, num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False
    )
    assert beams.shape[0] == 2


def test_the_placeholder_is_never_said(model):
    with torch.no_grad():
        model.lm_head.weight[model.config.image_token_id] += 5
    ids = prompt(model)
    said = generate(model, input_ids=ids, pixel_values=pixels(model))[:, ids.shape[1] :]
    assert model.config.image_token_id not in said


def test_saved_and_loaded_is_the_same_to_the_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")]
    assert not list(tmp_path.glob("*.bin"))
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is CommForConditionalGeneration
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not loaded.training
    ids, row = prompt(model), pixels(model)
    assert torch.equal(loaded(input_ids=ids, pixel_values=row).logits, model(input_ids=ids, pixel_values=row).logits)
    places = {"architectures": None, "_name_or_path": None}
    assert {**loaded.config.to_dict(), **places} == {**model.config.to_dict(), **places}
    assert not any(p.requires_grad for p in loaded.parts()["encoders"].parameters())
    assert loaded.generation_config.suppress_tokens == [model.config.image_token_id]
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.language_model.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_saved_weights_carry_the_models_own_names(model, tmp_path):
    """The Trainer resumes with load_state_dict(strict=False): a renamed key would be lost with a warning only."""
    model.save_pretrained(tmp_path)
    saved = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    own = set(model.state_dict())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert own - saved == tied
    assert saved <= own


def rows_of(model, count: int) -> list[dict[str, torch.Tensor]]:
    """Supervised tokens differ per row, so that a mean of means would differ from the mean over tokens."""
    data = []
    for seed in range(count):
        ids = prompt(model, after=4, seed=seed)[0]
        labels = ids.clone()
        labels[: len(ids) - 1 - seed % 3] = -100
        data.append({"input_ids": ids, "labels": labels, "pixel_values": pixels(model, seed=seed)[0]})
    return data


def train(
    model, folder: Path, *, steps: int, rows, batch: int = 1, accumulate: int = 1, resume: bool = False
) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
        logging_steps=1, save_steps=2, report_to=[], learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd",
        remove_unused_columns=False, disable_tqdm=True, use_cpu=True, max_grad_norm=0.0, seed=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_librarys_trainer_resumes_exactly_and_leaves_encoders_alone(root, tmp_path):
    rows = rows_of(comm(root), 8)
    straight = comm(root)
    frozen = {name: p.clone() for name, p in straight.parts()["encoders"].named_parameters()}
    losses = train(straight, tmp_path / "a", steps=4, rows=rows)
    train(comm(root), tmp_path / "b", steps=2, rows=rows)
    resumed = comm(root)
    assert train(resumed, tmp_path / "b", steps=4, rows=rows, resume=True)[-2:] == pytest.approx(losses[-2:], rel=1e-5)
    for (name, one), two in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    assert all(torch.equal(frozen[name], p) for name, p in straight.parts()["encoders"].named_parameters())


def test_accumulated_steps_weigh_supervised_tokens_equally(root, tmp_path):
    rows = rows_of(comm(root), 4)
    together, apart = comm(root), comm(root)
    train(together, tmp_path / "a", steps=1, rows=rows, batch=4)
    train(apart, tmp_path / "b", steps=1, rows=rows, accumulate=4)
    for (name, one), two in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)


def test_the_librarys_pipeline_answers(root):
    from PIL import Image

    tokenizer = tiny_tokenizer()
    model = build_model(comm_specs(root), language_model=language_model_folder(root), tokenizer=tokenizer)
    processor = build_processor(model.config, tokenizer, chat_template=TEMPLATE)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    image = Image.new("RGB", (40, 30), (200, 10, 10))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this ?"}]
    (answer,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    inputs = processor(images=image, text="<image> what is this ?", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == processor.decode(expected, skip_special_tokens=True)


def test_the_config_survives_json(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    loaded = type(model.config).from_pretrained(tmp_path)
    assert isinstance(loaded.vision_config.encoder_config("clip"), PreTrainedConfig)
    assert loaded.vision_config.branches == model.config.vision_config.branches
    assert (loaded.num_image_tokens, loaded.vision_config.grid) == (16, (4, 4))
