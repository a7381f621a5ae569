"""What the documentation of vLLM's Transformers modeling backend asks of a model. vLLM itself is not installed here."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig

from commvlm.app.vllm_plugin import register
from commvlm.model import CommConfig, CommForConditionalGeneration
from commvlm.train.assemble import assemble
from commvlm.train.recipe import load_recipe


@pytest.fixture(scope="module")
def made():
    return assemble(load_recipe("micro").model)


def test_the_entry_point_registers_and_may_be_called_in_every_process():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["commvlm"].split(":")
    register = getattr(importlib.import_module(module), name)
    register()
    register()
    assert isinstance(AutoConfig.for_model("comm"), CommConfig)


def test_the_class_that_a_saved_config_names_is_found_where_vllm_looks(made, tmp_path):
    register()
    made[0].save_pretrained(tmp_path)
    (named,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
    found = getattr(transformers, named, None)
    assert found is CommForConditionalGeneration
    assert found.is_backend_compatible()


def test_the_model_follows_the_conventions(made):
    model, processor = made
    assert model._supports_attention_backend
    assert model.get_encoder(modality="image") is model.model.vision_tower
    pixels = processor.image_processor(images=[Image.new("RGB", (40, 20), "red")] * 2, return_tensors="pt")[
        "pixel_values"
    ]
    with torch.inference_mode():
        found = model.get_image_features(pixels, return_dict=True).pooler_output
    count, width = model.config.num_image_tokens, model.config.text_config.hidden_size
    assert [tuple(tokens.shape) for tokens in found] == [(count, width)] * 2


def test_the_processor_says_how_many_tokens_an_image_is_and_where(made):
    _, processor = made
    count = processor.num_image_tokens
    planned = processor._get_num_multimodal_tokens(image_sizes=[(20, 40), (900, 30)])
    assert planned["num_image_tokens"] == [count, count]
    image = Image.new("RGB", (40, 20), "red")
    batch = processor(
        text=[f"a {processor.image_token} b"], images=[image], return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
    )  # fmt: skip
    (offsets,) = batch["text_replacement_offsets"]
    assert len(offsets) == 1
    assert sum(batch["mm_token_type_ids"][0]) == count
    assert batch["input_ids"][0].count(processor.image_token_id) == count
