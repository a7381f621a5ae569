"""Peers' checkpoints become ours: the same logits and the same greedy text as the library's own model, or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_tiny import ENCODERS, LANGUAGE_MODELS, PATCH, SIZE, enliven, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from commvlm.app.answering import load_checkpoint
from commvlm.cli import main

TOKENS = (SIZE // PATCH) ** 2
IMAGE = 4  # of the tiny tokenizer


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def llava(request, tmp_path_factory) -> tuple[Path, LlavaForConditionalGeneration]:
    """A tiny random LLaVA as save_pretrained writes it, with tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    text = LANGUAGE_MODELS[request.param]
    config = LlavaConfig(
        vision_config=ENCODERS["clip_vision_model"], text_config=text, image_token_id=IMAGE, vision_feature_layer=-2,
        tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    model = enliven(LlavaForConditionalGeneration(config)).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder, model


def ids_with_image(token: int, count: int) -> torch.Tensor:
    return torch.tensor([[1, 5, 6, *[token] * count, 7, 9, 10], [1, 12, 8, *[token] * count, 6, 10, 11]])


def test_llava_gives_the_same_logits_and_the_same_text(llava, tmp_path, capsys):
    folder, theirs = llava
    out = tmp_path / "ours"
    assert main(["import", "llava", str(folder), "--out", str(out)]) == 0
    assert "16 visual tokens" in capsys.readouterr().out
    ours, processor = load_checkpoint(out)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    ids = ids_with_image(IMAGE, TOKENS)
    with torch.no_grad():
        truth = theirs(input_ids=ids, pixel_values=pixels).logits
        got = ours(input_ids=ids, pixel_values=pixels.flatten(1)).logits
    assert (got - truth).abs().max() <= 1e-5
    assert truth.std() > 0.5  # not equal for being nothing
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE]}
    text = theirs.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **options)
    same = ours.generate(input_ids=ids, pixel_values=pixels.flatten(1), attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(text, same)
    images = processor.image_processor
    assert images.encoders == [{"name": "clip", "size": SIZE, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}]
    assert images.pad_color == [122, 116, 104]
    assert ours.config.vision_config.branches[0]["layers"] == [3]
    assert len(ours.model.vision_tower.encoder("clip").encoder.layers) == 3  # the last block is not needed


def test_an_imported_model_ends_where_its_tokenizer_says(llava, tmp_path):
    """Not at ids that its config has from elsewhere."""
    folder, model = llava
    text = {**model.config.text_config.to_dict(), "bos_token_id": 11, "eos_token_id": 12, "pad_token_id": 13}
    other = changed(folder, tmp_path / "other", text_config=text)
    assert main(["import", "llava", str(other), "--out", str(tmp_path / "ours")]) == 0
    ours, processor = load_checkpoint(tmp_path / "ours")
    said, tokenizer = ours.generation_config, processor.tokenizer
    assert (said.eos_token_id, said.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert said.eos_token_id not in (None, 12)
    assert said.suppress_tokens == [ours.config.image_token_id]


def changed(folder: Path, to: Path, **fields) -> Path:
    """The same checkpoint with other config fields."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **fields}))
    return to


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mm_vision_tower": "openai/clip"}, "LLaVA's original format"),
        ({"model_type": "llama"}, "is a 'llama', not a 'llava'"),
        ({"vision_feature_layer": [-2, -5]}, "side by side"),
        ({"vision_feature_layer": 0}, "reads layer 0 of 4"),
        ({"vision_feature_select_strategy": "full"}, "keeps the CLS token"),
        ({"projector_hidden_act": "relu"}, "projects by 'relu'"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(llava, tmp_path, capsys, fields, said):
    folder = changed(llava[0], tmp_path / "other", **fields)
    assert main(["import", "llava", str(folder), "--out", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ours").exists()


def test_pickles_missing_weights_and_nothing_are_refused(llava, tmp_path, capsys):
    lacking = changed(llava[0], tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights[next(name for name in weights if "linear_2.weight" in name)]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    pickled = changed(llava[0], tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    for folder, said in ((lacking, "lacks 1 weights"), (pickled, "safetensors"), (tmp_path / "none", "no tokenizer")):
        assert main(["import", "llava", str(folder), "--out", str(tmp_path / "ours")]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    assert main(["import", "llava", str(llava[0]), "--out", str(tmp_path / "there")]) == 2
    assert "exists: choose another --out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shikra(tmp_path_factory) -> tuple[Path, Path, LlamaForCausalLM, nn.Linear]:
    """A tiny random Shikra in its own format: LLaMA's weights, model.mm_projector, its config fields, its three tokens."""
    root = tmp_path_factory.mktemp("shikra")
    torch.manual_seed(0)
    clip = enliven(AutoModel.from_config(ENCODERS["clip_vision_model"])).eval()
    clip.save_pretrained(root / "clip")
    language = enliven(LlamaForCausalLM(LANGUAGE_MODELS["llama"])).eval()
    projector = nn.Linear(32, 48)
    folder = root / "shikra"
    language.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.mm_projector.{name}": p.detach() for name, p in projector.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "shikra", "architectures": ["ShikraLlamaForCausalLM"], "mm_vision_tower": str(root / "clip"),
        "mm_vision_select_layer": -2, "mm_hidden_size": 32, "use_mm_proj": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder, root / "clip", language, projector


def test_shikra_gives_the_logits_of_its_own_arithmetic(shikra, tmp_path, capsys):
    """By hand: CLIP's second last layer without CLS, one Linear, between the embeddings of <im_start> and <im_end>."""
    folder, clip_folder, language, projector = shikra
    out = tmp_path / "ours"
    assert main(["import", "shikra", str(folder), "--out", str(out)]) == 0
    assert "18 visual tokens" in capsys.readouterr().out
    ours, processor = load_checkpoint(out)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    start, end = (processor.tokenizer.convert_tokens_to_ids(t) for t in ("<im_start>", "<im_end>"))
    ids = ids_with_image(ours.config.image_token_id, TOKENS + 2)
    clip = CLIPVisionModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        hidden = clip(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        given = ids.clone()
        given[:, 3], given[:, 4 + TOKENS] = start, end
        given[:, 4 : 4 + TOKENS] = 0
        embeds = language.get_input_embeddings()(given)
        embeds[:, 4 : 4 + TOKENS] = projector(hidden)
        truth = language(inputs_embeds=embeds).logits
        got = ours(input_ids=ids, pixel_values=pixels.flatten(1)).logits
    assert (got[..., : truth.shape[-1]] - truth).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llava"}, "is a 'llava', not a 'shikra'"),
        ({"mm_vision_tower": None}, "names no vision encoder"),
        ({"mm_vision_tower": "/nowhere/clip"}, "is not a folder"),
    ],
)
def test_what_is_no_shikra_is_refused(shikra, tmp_path, capsys, fields, said):
    folder = changed(shikra[0], tmp_path / "other", **fields)
    assert main(["import", "shikra", str(folder), "--out", str(tmp_path / "ours")]) == 2
    assert said in capsys.readouterr().err


def test_shikra_without_its_projector_or_tokens_is_refused(shikra, tmp_path, capsys):
    bare = changed(shikra[0], tmp_path / "bare")
    weights = {k: v for k, v in load_file(bare / "model.safetensors").items() if "mm_projector" not in k}
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    plain = changed(shikra[0], tmp_path / "plain")
    tiny_tokenizer().save_pretrained(plain)
    hub = "somebody/shikra-7b"
    for folder, said in ((hub, "is no folder"), (bare, "no model.mm_projector.weight"), (plain, "has no <im_patch>")):
        assert main(["import", "shikra", str(folder), "--out", str(tmp_path / "ours")]) == 2
        assert said in capsys.readouterr().err
