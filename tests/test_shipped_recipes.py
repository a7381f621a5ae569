"""Every shipped recipe: its true sizes on the meta device, and a model of the same structure that runs and learns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
from pathlib import Path

import pytest
import torch
from test_model_tiny import prompt

from commvlm.cli import main
from commvlm.model import build_config, build_model
from commvlm.model.checkpoints import find_checkpoint
from commvlm.model.families import family_of, vision_half
from commvlm.train.assemble import encoder_spec, model_settings
from commvlm.train.recipe import load_recipe, shipped_recipes

REAL = [name for name in shipped_recipes() if name != "micro"]

LARGE = {"clip": 303.5e6, "dinov2": 304.4e6}  # published sizes of the vision halves, ViT-L/14
PROMISED = {  # visual tokens, by the patches of the images that the papers feed
    "comm-7b": 24 * 24, "comm-13b": 24 * 24, "peers/llava-1.5-7b": 24 * 24, "peers/shikra-7b": 16 * 16 + 2,
    "peers/prismatic-dinosiglip-7b": 27 * 27, "peers/mmvp-imof-7b": 2 * 24 * 24,
    "peers/dense-connector-sti-7b": 576 + 72 + 72, "peers/dense-connector-sci-7b": 576,
    "peers/dense-connector-dci-7b": 576, "controls/clip-336-7b": 576, "controls/clip-336-mfm-7b": 576,
    "controls/dinov2-336-7b": 576, "controls/dinov2-336-mfm-7b": 576, "controls/comm-no-mfm-7b": 576,
    "controls/clip-h-mfm-7b": 576, "comm-modern-4b": 27 * 27,
}  # fmt: skip


@functools.cache
def inspected(name: str) -> dict[tuple[str, str], dict]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["inspect", name, "--json"]) == 0
    return {(row["part"], row["encoder"]): row for row in json.loads(said.getvalue())}


@pytest.mark.parametrize("name", REAL)
def test_true_sizes_need_facts_alone(name):
    recipe = load_recipe(name)
    assert all(find_checkpoint(encoder.checkpoint).source == "facts" for encoder in recipe.model.encoders)
    if "/" in name:  # a peer or a control: COMM's with another visual half
        assert recipe.model.language_model == load_recipe("comm-7b").model.language_model
        assert build_config(**model_settings(recipe.model)).num_image_tokens == PROMISED[name]
        return
    rows = inspected(name)
    assert rows["total", ""]["tokens"] == PROMISED.get(name, rows["total", ""]["tokens"])
    for encoder in recipe.model.encoders:
        assert rows["encoders", encoder.name]["trained"] == 0
    billions = 13.02e9 if "13b" in name else 6.74e9 if "7b" in name else None
    if billions:
        assert rows["language_model", ""]["parameters"] == pytest.approx(billions, rel=0.005)
    assert rows["language_model", ""]["trained"] == rows["language_model", ""]["parameters"]


@pytest.mark.parametrize("name", ["comm-7b", "comm-13b"])
def test_comm_is_what_the_paper_says(name):
    rows = inspected(name)
    assert rows["total", ""]["grid"] == [24, 24]
    assert rows["encoders", "clip"]["layers"] == "1-24 of 24"
    assert rows["encoders", "dinov2"]["layers"] == "19-24 of 24"
    for encoder, published in LARGE.items():
        assert rows["encoders", encoder]["parameters"] == pytest.approx(published, rel=0.01)


def test_the_modern_recipe_has_the_published_sizes():
    """4,022,468,096 of Qwen3-4B's safetensors (its embedding is its head), one row more for the placeholder."""
    rows = inspected("comm-modern-4b")
    assert rows["language_model", ""]["parameters"] == 4_022_468_096 + 2560
    assert rows["encoders", "siglip2"]["parameters"] == pytest.approx(
        412e6, rel=0.01
    )  # its vision half without the pooling head
    assert rows["encoders", "dinov3"]["parameters"] == pytest.approx(303e6, rel=0.01)
    assert rows["total", ""]["grid"] == [27, 27]


def test_the_capacity_control_is_as_large_and_as_costly_as_two_encoders():
    """Published: 632 M parameters of the vision half of CLIP ViT-H/14."""
    comm, single = inspected("comm-7b"), inspected("controls/clip-h-mfm-7b")
    for field in ("parameters", "flops"):
        pair = sum(comm["encoders", encoder][field] for encoder in LARGE)
        assert single["encoders", "clip"][field] == pytest.approx(pair, rel=0.05)
    assert single["encoders", "clip"]["parameters"] == pytest.approx(632e6, rel=0.01)


def shrunk(folder: Path, checkpoint: str, **fields) -> str:
    """A folder with the config of `checkpoint`, as deep and of the same patches, but narrow."""
    given = find_checkpoint(checkpoint).config.to_dict()
    given.pop("layer_types", None)  # one entry a block; the library makes it again
    place = folder / checkpoint.replace("/", "--")
    place.mkdir(exist_ok=True)
    narrow = {key: value for key, value in fields.items() if key in given}
    (place / "config.json").write_text(json.dumps({**given, **narrow}))
    return str(place)


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_same_structure_runs_and_learns_with_random_weights(name, tmp_path):
    """Depths, layers, patches and image sizes are the recipe's own; widths are small."""
    recipe = load_recipe(name).model
    text = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 12,
        "num_key_value_heads": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    settings = model_settings(recipe)
    if not recipe.language_model.startswith("micro:"):
        settings["language_model"] = shrunk(tmp_path, recipe.language_model, **text)
        narrow = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        settings["encoders"] = [
            encoder_spec(dataclasses.replace(e, checkpoint=shrunk(tmp_path, e.checkpoint, **narrow)))
            for e in recipe.encoders
        ]
    model = build_model(**settings, weights="random").train()
    whole = build_config(**model_settings(recipe))
    assert model.config.num_image_tokens == whole.num_image_tokens
    for branch, given in zip(model.config.vision_config.branches, whole.vision_config.branches, strict=True):
        assert branch["layers"] == given["layers"]
        assert branch["depth"] == family_of(vision_half(whole.vision_config.encoder_config(given["name"]))).depth(
            find_checkpoint(_checkpoint(settings, given["name"])).config
        )
    ids = prompt(model)
    row = torch.randn(1, model.config.vision_config.pixels_per_image)
    output = model(input_ids=ids, pixel_values=row, labels=ids)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    parts = model.parts()
    assert all(p.grad is None for p in parts["encoders"].parameters())
    for part in ("merge", "align", "project"):
        for key, parameter in parts[part].named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
    assert output.image_hidden_states.shape == (model.config.num_image_tokens, model.config.text_config.hidden_size)


def test_the_five_lines_of_the_docs_are_a_recipe(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    rows = inspected(str(tmp_path / "mine.yaml"))
    assert rows["total", ""]["tokens"] == 576
    assert rows["encoders", "dinov3"]["layers"] == "19-24 of 24"
    assert rows["encoders", "dinov3"]["parameters"] == pytest.approx(303e6, rel=0.01)


def _checkpoint(settings: dict, name: str) -> str:
    return next(spec.checkpoint for spec in settings["encoders"] if spec.name == name)


def test_compare_puts_them_side_by_side(capsys):
    assert main(["compare", "comm-7b", "peers/llava-1.5-7b", "--no-measure", "--json"]) == 0
    comm, llava = json.loads(capsys.readouterr().out)
    rows = inspected("comm-7b")
    assert comm["parameters"]["encoders"] == sum(rows["encoders", e]["parameters"] for e in LARGE)
    assert sum(comm["parameters"].values()) == rows["total", ""]["parameters"]
    assert sum(comm["flops"].values()) == rows["total", ""]["flops"]
    assert (comm["tokens"], llava["tokens"], llava["measured"]) == (576, 576, None)
    assert llava["parameters"]["added"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096  # LLaVA-1.5's projection


def test_compare_measures_and_draws_a_table(capsys):
    assert main(["compare", "micro", "micro", "--runs", "2", "--dtype", "fp32", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["measured"]["peak_bytes"] == second["measured"]["peak_bytes"] > 64 * 128 * 4
    assert first["measured"]["seconds"] > 0
    assert main(["compare", "micro", "--runs", "1"]) == 0
    out = capsys.readouterr().out
    assert "peak MB" in out
    assert "median of 1 passes" in out


def test_inspect_measures_when_asked(capsys):
    assert main(["inspect", "micro", "--measure", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)[-1]
    assert measured["part"] == "measured"
    assert measured["seconds"] > 0
    assert measured["peak_bytes"] > 64 * 128 * 2
    assert main(["inspect", "micro", "--measure"]) == 0
    assert "ms an image" in capsys.readouterr().out


def test_a_slip_in_the_second_recipe_is_told_before_the_first_is_measured(capsys):
    assert main(["compare", "micro", "peers/lava-1.5-7b"]) == 2
    assert "did you mean 'peers/llava-1.5-7b'" in capsys.readouterr().err
