"""Answering with a saved checkpoint: greedy decoding by hand gives the same; folders that are no checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from commvlm.app.answering import Answerer, load_checkpoint, resolve_checkpoint
from commvlm.data.boxes import PadSquare
from commvlm.data.dialogue import encode_prompt
from commvlm.data.example import Example, Turn
from commvlm.data.templates import instruct
from commvlm.train.assemble import assemble
from commvlm.train.recipe import load_recipe


def save_checkpoint(folder: Path) -> Path:
    """COMM in the micro recipe's shapes, its language model pretrained, the rest at its random start."""
    model, processor = assemble(load_recipe("micro").model)
    with torch.no_grad():  # a projection loud enough that the image has a say
        model.model.multi_modal_projector.weight.mul_(30)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Noise in colour blocks: square, wide and tall."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for k, (width, height) in enumerate([(64, 64), (96, 48), (40, 72)]):
        blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(folder / f"{k}.png")
        paths.append(folder / f"{k}.png")
    return paths


@pytest.fixture(scope="module")
def examples(images) -> list[Example]:
    """Questions of different lengths, those about one image apart from each other, one with boxes, one with a past."""
    rows = [
        Example("0", "rec", images[0], (Turn("the red star", "unseen"),)),
        Example("1", "pope", images[1], (Turn("Is there a cup in the image?", "no"),)),
        Example("2", "vqa", images[0], (Turn("Is the red star left of the blue house?", "no"),)),
        Example("3", "caption", images[2], (Turn("", "unseen"),)),
        Example("4", "reg", images[1], (Turn("<boxes>", "unseen", (((8.0, 8.0, 40.0, 30.0),),)),)),
        Example("5", "vqa", images[0], (Turn("How many stars are there?", "1"),)),
    ]
    asked = [instruct(row) for row in rows]
    past = instruct(Example("6", "vqa", images[1], (Turn("What color is the cup?", "red"),)))
    asked.append(dataclasses.replace(past, turns=(*past.turns, Turn("Where is it?", "unseen"))))
    return asked


def by_hand(model, processor, example: Example, *, most: int) -> str:
    """Greedy decoding of one example: no batch, no padding, no cache, no `generate`."""
    with Image.open(str(example.image)) as opened:
        image = opened.convert("RGB")
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    count, geometry = model.config.num_image_tokens, PadSquare(*image.size)
    ids = encode_prompt(example, processor.tokenizer, image_tokens=count, geometry=geometry)
    start, row = len(ids), torch.from_numpy(ids)[None]
    while row.shape[1] < start + most:
        with torch.no_grad():
            logits = model(input_ids=row, pixel_values=pixels).logits[0, -1]
        logits[model.config.image_token_id] = -torch.inf
        if (said := int(logits.argmax())) == processor.tokenizer.eos_token_id:
            break
        row = torch.cat([row, torch.tensor([[said]])], dim=1)
    return processor.tokenizer.decode(row[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_answers_are_greedy_decoding_by_hand_in_the_examples_order(checkpoint, examples, batch_size):
    model, processor = load_checkpoint(checkpoint)
    truth = [by_hand(model, processor, example, most=12) for example in examples]
    assert len(set(truth)) > 2  # they differ, so that an order can be wrong
    answer = Answerer(checkpoint, max_new_tokens=12, batch_size=batch_size)
    assert answer(examples) == truth
    assert answer(examples[::-1]) == truth[::-1]


def test_a_past_answer_is_read_and_the_true_one_is_not(checkpoint, examples):
    answer = Answerer(checkpoint, max_new_tokens=12)
    turn = examples[0].turns[0]
    other = dataclasses.replace(examples[0], turns=(dataclasses.replace(turn, answer="the blue house " * 9),))
    assert answer([other]) == answer([examples[0]])


def test_questions_about_one_image_read_it_once(checkpoint, examples):
    answer = Answerer(checkpoint, max_new_tokens=2)
    rows = []
    encoder = answer.model.model.vision_tower
    handle = encoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output.last_hidden_state)))
    answer(examples)
    handle.remove()
    assert rows == [3]  # seven questions about three images


def test_another_image_under_the_same_name_is_read_anew(checkpoint, images, tmp_path):
    def about(path: Path) -> list[Example]:
        return [instruct(Example("0", "caption", path, (Turn("", "unseen"),)))]

    answer, path = Answerer(checkpoint, max_new_tokens=2), tmp_path / "a.png"
    for image, time in ((images[0], 5), (images[1], 6), (images[1], 6)):
        path.write_bytes(image.read_bytes())
        os.utime(path, ns=(time, time))
        answer(about(path))
    first, second = answer._remembered.values()
    assert not torch.equal(first, second)


def test_rounded_weights_say_what_autocast_says(checkpoint, examples):
    """bf16: Linears are rounded once, and every number is that of autocast on the whole ones."""
    half, whole = Answerer(checkpoint, max_new_tokens=12, precision="bf16"), Answerer(checkpoint, max_new_tokens=12)
    whole.precision = "bf16"
    kinds = {m.weight.dtype for m in half.model.modules() if type(m) is torch.nn.Linear}
    assert torch.bfloat16 in kinds
    assert half.model.get_input_embeddings().weight.dtype == torch.float32
    batch = half.collator.prompt_batch(examples[:2])
    with torch.inference_mode():
        found = []
        for answer in (half, whole):
            with answer.autocast():
                found.append(answer.model(**batch).logits)
    torch.testing.assert_close(*found, atol=0, rtol=0)
    assert half(examples) == whole(examples)


@pytest.mark.parametrize("name", ["foo", "cuda:77"])
def test_a_device_that_is_none_is_said_in_one_line(checkpoint, name):
    with pytest.raises(ValueError, match=f"device '{name}'"):
        Answerer(checkpoint, device=name)


def test_grey_sees_no_image_and_equals_a_grey_picture(checkpoint, images, tmp_path):
    def about(path: Path) -> list[Example]:
        return [instruct(Example("0", "rec", path, (Turn("the red star", "unseen"),)))]

    other, grey = tmp_path / "other.png", tmp_path / "grey.png"
    Image.new("RGB", (96, 48), "yellow").save(other)
    Image.new("RGB", (96, 48), (128, 128, 128)).save(grey)
    given, blind = Answerer(checkpoint), Answerer(checkpoint, images="grey")
    assert blind(about(images[1])) == blind(about(other)) == given(about(grey))
    pixels = [a.collator.prompt_batch(about(images[1]))["pixel_values"] for a in (given, blind)]
    assert not torch.equal(*pixels)


def test_a_conversation_that_leaves_no_room_is_refused(checkpoint, examples):
    answer = Answerer(checkpoint, max_new_tokens=8)
    stated = answer.model.config.text_config.max_position_embeddings
    turn = dataclasses.replace(examples[5].turns[0], question="<image>\n" + "a b " * stated)
    long = dataclasses.replace(examples[5], turns=(turn,))
    with pytest.raises(ValueError, match=f"example 5: .* exceed max_length {stated - 8}"):
        answer([long])


def test_no_examples_have_no_answers(checkpoint):
    assert Answerer(checkpoint)([]) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"images": "gray"}, "images is 'gray'; valid: given, grey"), ({"precision": "fp8"}, "precision is 'fp8'"),
     ({"batch_size": 0}, "must be positive")],
)  # fmt: skip
def test_wrong_settings_are_refused_before_loading(wrong, said):
    with pytest.raises(ValueError, match=said):
        Answerer("nowhere", **wrong)


# What is a checkpoint


def test_a_run_and_a_demo_lead_to_their_model(checkpoint, tmp_path):
    run = tmp_path / "demo" / "comm"
    run.mkdir(parents=True)
    shutil.copytree(checkpoint, run / "model")
    (run / "run.json").write_text(json.dumps({"model": "model"}))
    (tmp_path / "demo" / "run.json").write_text(json.dumps({"model": "comm/model"}))
    for path in (run / "model", run, tmp_path / "demo"):
        assert resolve_checkpoint(path) == run / "model"


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "is no checkpoint: no config.json .*give a folder made by `commvlm train`"),
        ({"config.json": {"model_type": "llama"}}, "model_type 'llama', not 'comm'"),
        ({"config.json": "{"}, "config.json is no JSON"),
        ({"config.json": "[]"}, "config.json holds a list"),
        ({"run.json": {"model": "../other"}}, "names the model '../other', which is no folder inside"),
        ({"run.json": {"model": "/etc"}}, "names the model '/etc'"),
        ({"run.json": {"model": ""}}, "names the model ''"),
        ({"run.json": {"seconds": 3}}, "names the model None"),
        ({"run.json": {"model": "gone"}}, "gone is no checkpoint: there is no such folder"),
        ({"recipe.yaml": "name: x"}, "is an unfinished run"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, files, said):
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=said) as error:
        resolve_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_and_a_file_are_no_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint: there is no such folder"):
            resolve_checkpoint(tmp_path / name)


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_missing_weight_is_an_error_and_not_a_random_one(copied):
    tensors = load_file(copied / "model.safetensors")
    lost = next(name for name in tensors if "multi_modal_projector.weight" in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*multi_modal_projector"):
        load_checkpoint(copied)


def test_weights_of_another_shape_are_an_error(copied):
    tensors = load_file(copied / "model.safetensors")
    name = next(name for name in tensors if "multi_modal_projector.weight" in name)
    tensors[name] = tensors[name][:5].clone()
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be loaded|lacks 1 weights") as error:
        load_checkpoint(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 100, 100_000])
def test_truncated_weights_are_said_in_one_line(copied, keep):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cannot be loaded .*copy or train it again") as error:
        load_checkpoint(copied)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_never_read(copied):
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_checkpoint(copied)


def test_a_folder_without_its_processor_is_said(copied):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        (copied / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_checkpoint(copied)


def test_another_model_is_not_taken_for_ours(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'llama'"):
        load_checkpoint(tmp_path)


def test_a_streamed_answer_grows_to_the_one_that_a_batch_gives(checkpoint, examples):
    answer, steps = Answerer(checkpoint, max_new_tokens=12), 0
    for example, whole in zip(examples, answer(examples), strict=True):
        parts = list(answer.stream(example))
        steps = max(steps, len(parts))
        assert parts[-1] == whole
        assert len(set(parts)) == len(parts)
        assert all(after.startswith(before) for before, after in pairwise(parts))
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts[:-1])
    assert steps > 2


def test_a_streamed_answer_steps_one_token_at_a_time(checkpoint, examples):
    answer = Answerer(checkpoint, max_new_tokens=12)
    calls = []
    handle = answer.model.register_forward_hook(lambda *_: calls.append(1))
    stream = answer.stream(examples[0])
    next(stream)
    assert len(calls) == 1  # nothing is read ahead of what is shown
    stream.close()
    handle.remove()


def test_parts_are_switched_off_for_one_answer_and_the_next_sees_them_again(checkpoint, examples):
    answer, without = Answerer(checkpoint, max_new_tokens=12), Answerer(checkpoint, max_new_tokens=12, knock_out="clip")
    (off,) = without(examples[:1])
    (on,) = answer(examples[:1])
    assert [*answer.stream(examples[0], knock_out="clip")][-1] == off != on
    assert [*answer.stream(examples[0])][-1] == on
    with pytest.raises(ValueError, match="no encoder 'dino'"):
        next(answer.stream(examples[0], knock_out="dino"))


def test_boxes_are_read_in_what_the_model_is_shown(checkpoint):
    answer = Answerer(checkpoint)
    assert answer.view(90, 45).window == (0, -22, 90, 68)
    answer.collator = dataclasses.replace(answer.collator, geometry="center-crop")
    assert answer.view(90, 45).window == (22, 0, 67, 45)
