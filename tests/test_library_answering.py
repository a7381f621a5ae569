"""Other models through the same runner: tiny LLaVA and Qwen-VL of the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)

from commvlm.app.library_answering import LibraryAnswerer, load_library_model
from commvlm.cli import main
from commvlm.data.boxes import CODECS, format_boxes
from commvlm.data.example import BOXES, Example, Turn
from commvlm.data.geometry import GEOMETRIES
from commvlm.data.templates import instruct
from commvlm.evaluate.predictions import read_predictions
from commvlm.evaluate.run import predict, score
from commvlm.train.assemble import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{{ 'IMAGE' if c.type == 'image' else c.text }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def loud(model):
    """Far from the library's quiet start, so that answers differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=["with a chat template", "without"])
def llava(request, tmp_path_factory) -> Path:
    tokenizer = load_tokenizer("micro:lm")
    tokenizer.chat_template = None
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4,
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size), tokenizer, patch_size=14,
        vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>") if request.param.startswith("with a") else None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llava") / "llava"
    loud(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen(config_class, model_class, processor_class, vision, monkeypatch):
    """Its video half needs torchvision and is left out."""
    tokenizer = load_tokenizer("micro:lm")
    tokenizer.chat_template = None
    marks = ("<image>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks[1:])})
    ids = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
                   tokenizer.convert_tokens_to_ids(list(marks)), strict=True))  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT}
    model = loud(model_class(config_class(vision_config=vision, text_config=text, **ids)))
    check = ProcessorMixin.check_argument_for_proper_class
    monkeypatch.setattr(
        ProcessorMixin, "check_argument_for_proper_class",
        lambda self, name, value: None if name == "video_processor" else check(self, name, value),
    )  # fmt: skip
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16})
    shown = TEMPLATE.replace("IMAGE", "<|vision_start|><image><|vision_end|>")
    return model, processor_class(pictures, tokenizer, video_processor=None, chat_template=shown)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for k, size in enumerate([(64, 64), (100, 50), (40, 90)]):
        Image.linear_gradient("L").resize(size).rotate(90 * k).convert("RGB").save(folder / f"{k}.png")
        paths.append(folder / f"{k}.png")
    return paths


@pytest.fixture(scope="module")
def examples(images) -> list[Example]:
    asked = [
        Example(f"{k}:{n}", "pope", image, (Turn(question, "yes"),), ("yes",))
        for k, image in enumerate(images)
        for n, question in enumerate(("Is there a cup in the image?", "Is there a star?"))
    ]
    return [instruct(example) for example in [*asked, Example("blind", "pope", None, (Turn("Is it so?", "no"),))]]


def check_batches(model, processor, examples) -> None:
    one, many = (LibraryAnswerer(model, processor, max_new_tokens=6, batch_size=size) for size in (1, 4))
    said = many(examples)
    assert said == one(examples)
    assert len(set(said)) > 1


def test_a_llava_answers_alike_in_any_batch(llava, examples):
    check_batches(*load_library_model(llava), examples)


def test_penalties_that_a_checkpoint_brings_are_lifted(llava, examples):
    """As Qwen2-VL's has a repetition penalty, which counts the words of the question, too."""
    plain = LibraryAnswerer(*load_library_model(llava), max_new_tokens=8)(examples)
    model, processor = load_library_model(llava)
    told = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 8, "forced_bos_token_id": 7}
    for name, value in told.items():
        setattr(model.generation_config, name, value)
    assert LibraryAnswerer(model, processor, max_new_tokens=8)(examples) == plain
    assert model.generation_config.forced_bos_token_id == 7  # no penalty


@pytest.mark.parametrize("template", [TEMPLATE, "{{ bos_token }}" + TEMPLATE], ids=["no BOS", "BOS"])
def test_a_prompt_begins_once_whoever_writes_its_beginning(template, llava, examples):
    """The tokenizer puts BOS before every text, as Llama's and Gemma's do."""
    model, processor = load_library_model(llava)
    processor.chat_template = template.replace("IMAGE", "<image>")
    tokenizer = processor.tokenizer
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$0", special_tokens=[])
    plain = tokenizer("a")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $0", special_tokens=[begin])
    assert tokenizer("a")["input_ids"] == [begin[1], *plain]
    seen = []
    generate = model.generate

    def spy(**inputs):
        seen.extend((inputs["input_ids"] == begin[1]).sum(1).tolist())
        return generate(**inputs)

    model.generate = spy
    LibraryAnswerer(model, processor, max_new_tokens=1, batch_size=4)(examples)
    assert seen == [1] * len(examples)


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_a_qwen_answers_alike_in_any_batch(version, examples, monkeypatch):
    size = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    if version == "2":
        parts = (
            Qwen2VLConfig,
            Qwen2VLForConditionalGeneration,
            Qwen2VLProcessor,
            {**size, "embed_dim": 32, "mlp_ratio": 2},
        )
    else:
        more = {"out_hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [1]}
        parts = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, {**size, **more}
    check_batches(*qwen(*parts, monkeypatch), examples)


def test_the_whole_way_with_a_llava(llava, world, tmp_path, capsys):
    argv = ["evaluate", str(llava), "--recipe", "micro", "--data.root", str(world), "--out", str(tmp_path / "out")]
    argv += ["--tasks", "pope,rec", "--evaluate.max_new_tokens", "4", "--evaluate.codec", "0-1000", "--json"]
    assert main([*argv, "--evaluate.geometry", "stretch"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores) == {"pope", "rec"}
    receipt = json.loads((tmp_path / "out" / "receipts" / "rec.json").read_text())
    assert receipt["box_codec"] == "0-1000, stretch"
    assert receipt["made"]["model"]["sha256"]
    assert {r.facts["box_codec"] for r in read_predictions(tmp_path / "out" / "predictions" / "rec.jsonl")} == {
        "0-1000"
    }


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("geometry", ["pad-square", "stretch"])
def test_boxes_in_other_notations_score(codec, geometry, images, tmp_path):
    """Who writes the true boxes in a notation, and says so, scores 100; read as Shikra's they are lost."""
    box = (10.0, 4.0, 36.0, 40.0)
    asked = [
        Example(str(k), "rec", image, (Turn("it", BOXES, answer_boxes=((box,),)),)) for k, image in enumerate(images)
    ]

    def answer(batch):
        views = [GEOMETRIES[geometry](*Image.open(e.image).size) for e in batch]
        return [format_boxes([box], view, CODECS[codec]) for view in views]

    noted = predict(
        answer, asked, tmp_path / "a.jsonl", progress=None, notes={"box_codec": codec, "geometry": geometry}
    )
    for rule in ("standard", "shikra", "mattnet"):
        assert score(noted, rules={"rec": rule})["rec"].value == 100
    if codec != "shikra3":
        plain = predict(answer, asked, tmp_path / "b.jsonl", progress=None)
        assert score(plain)["rec"].value == 0


def test_questions_with_boxes_are_asked_in_the_models_notation(llava, images):
    model, processor = load_library_model(llava)
    example = instruct(Example("0", "reg", images[1], (Turn(BOXES, "", (((10.0, 5.0, 60.0, 25.0),),)),)))
    with Image.open(images[1]) as image:
        asked = LibraryAnswerer(model, processor, codec="0-1000", geometry="stretch").prompt(example, image)
    assert "[100,100,600,500]" in asked
    assert asked.count("<image>") == 1
    with pytest.raises(ValueError, match="no geometry 'round'"):
        LibraryAnswerer(model, processor, geometry="round")


@pytest.mark.parametrize("limit", [6, 200])
def test_an_answer_is_without_its_prompt_however_long_it_may_be(llava, images, limit):
    """The library's own cut: what `generate` gives after the prompt's tokens."""
    model, processor = load_library_model(llava)
    answer = LibraryAnswerer(model, processor, max_new_tokens=limit)
    example = instruct(Example("0", "pope", images[0], (Turn("Is there a cup?", "no"),)))
    with Image.open(images[0]) as image:
        batch = processor(text=[answer.prompt(example, image)], images=[[image]], return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=limit, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert answer([example]) == [processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()]


def test_a_template_that_the_tokenizer_alone_has_is_used(llava, images):
    model, processor = load_library_model(llava)
    shown = TEMPLATE.replace("IMAGE", "<image>")
    processor.chat_template, processor.tokenizer.chat_template = None, shown
    example = instruct(Example("0", "pope", images[0], (Turn("Is there a cup?", "no"),)))
    with Image.open(images[0]) as image:
        asked = LibraryAnswerer(model, processor).prompt(example, image)
        processor.chat_template = shown
        assert asked == LibraryAnswerer(model, processor).prompt(example, image)
    assert "ASSISTANT" not in asked


def test_what_is_no_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="cannot be loaded as an image-text-to-text model") as error:
        load_library_model(tmp_path)
    assert "\n" not in str(error.value)
