"""Building from names: shipped facts, costs on the meta device, and settings that do not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_model_tiny import comm_specs, encoder_folder, language_model_folder, tiny_tokenizer
from transformers import AutoModel, LlamaConfig

from commvlm.model import CheckpointError, EncoderSpec, build_config, build_model, build_processor, find_checkpoint
from commvlm.model.config import CommConfig, CommVisionConfig
from commvlm.model.cost import inspect_model

PAPER = [
    EncoderSpec("clip", "openai/clip-vit-large-patch14-336", "all"),
    EncoderSpec("dinov2", "facebook/dinov2-large", "19-24", align="mlp", image_size=336),
]
VICUNA = "lmsys/vicuna-7b-v1.5"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def paper() -> CommConfig:
    return build_config(PAPER, language_model=VICUNA)


def test_the_papers_model_from_shipped_facts_has_576_tokens(paper):
    assert paper.num_image_tokens == 576
    assert paper.vision_config.grid == (24, 24)
    assert paper.vision_config.hidden_size == 2048
    assert paper.vision_config.branches[0]["layers"] == list(range(1, 25))
    assert paper.vision_config.branches[1]["layers"] == [19, 20, 21, 22, 23, 24]
    means = [branch["mean"][0] for branch in paper.vision_config.branches]
    assert means == pytest.approx([0.48145466, 0.485])  # each its own


def test_costs_are_those_of_arithmetic_by_hand(paper):
    rows = {(row.part, row.encoder): row for row in inspect_model(paper)}
    tokens, dim, text = 576, 1024, 4096
    block = 4 * 2 * 577 * dim**2 + 2 * 2 * 577**2 * dim + 2 * 2 * 577 * dim * 4 * dim
    encoder = 24 * block + 2 * tokens * 14 * 14 * 3 * dim
    assert rows["encoders", "clip"].flops == rows["encoders", "dinov2"].flops == encoder
    assert rows["merge", "clip"].flops == 24 * 2 * tokens * dim**2
    assert rows["merge", "dinov2"].parameters == 6 * (2 * dim + dim**2 + dim) + 6
    assert rows["align", "clip"].parameters == 0
    assert rows["align", "dinov2"].parameters == (4 * dim**2 + 4 * dim) + (16 * dim**2 + 4 * dim) + (4 * dim**2 + dim)
    assert rows["project", ""].parameters == 2 * dim * text + text
    assert rows["project", ""].flops == 2 * tokens * 2 * dim * text
    llama = 32 * (4 * text**2 + 3 * text * 11008 + 2 * text) + text + 2 * 32001 * text
    assert rows["language_model", ""].parameters == llama
    assert rows["encoders", "clip"].parameters == 303_507_456  # of the published vision half
    assert rows["encoders", "clip"].layers == "1-24 of 24"
    assert rows["encoders", "dinov2"].layers == "19-24 of 24"
    total = rows["total", ""]
    assert total.tokens == 576
    assert total.parameters == sum(row.parameters for row in rows.values()) - total.parameters
    assert total.trained == total.parameters - 303_507_456 - rows["encoders", "dinov2"].parameters


def test_costs_follow_layers_and_what_a_recipe_trains():
    shallow = build_config([replace(PAPER[0], layers=12, merge="mean")], language_model=VICUNA)
    rows = {row.part: row for row in inspect_model(shallow, trains=["project"])}
    whole = {row.part: row for row in inspect_model(build_config([PAPER[0]], language_model=VICUNA))}
    patches = 2 * 576 * 14 * 14 * 3 * 1024
    assert (rows["encoders"].flops - patches) * 2 == whole["encoders"].flops - patches
    assert rows["total"].trained == rows["project"].parameters
    with pytest.raises(ValueError, match="did you mean 'project'"):
        inspect_model(shallow, trains=["projec"])


def test_every_shipped_fact_makes_a_model_on_the_meta_device():
    other = [EncoderSpec("clip", "openai/clip-vit-large-patch14", image_size=336), PAPER[1]]
    model = build_model(other, language_model="lmsys/vicuna-13b-v1.5", device="meta", weights="random")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.config.num_image_tokens == 576
    # Published size of the 13B, plus one row for the placeholder in embedding and head.
    assert sum(p.numel() for p in model.parts()["language_model"].parameters()) == 13_015_864_320 + 2 * 5120


def test_mismatched_grids_are_refused_with_both_and_the_remedy():
    with pytest.raises(ValueError, match=r"'clip' \(24 x 24, .*336\) and 'dinov2' \(37 x 37, .*518\).*to 336") as error:
        build_config([PAPER[0], replace(PAPER[1], image_size=None)], language_model=VICUNA)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", [0, 25, "19-", [1, 1]])
def test_wrong_layers_name_the_encoder_and_its_depth(layers):
    with pytest.raises(ValueError, match=r"encoder 'clip' \(openai/clip.*the encoder has 24 layers; valid: 1 to 24"):
        build_config([replace(PAPER[0], layers=layers)], language_model=VICUNA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "openai/clip-vit-large-patch14-33"}, "did you mean 'openai/clip-vit-large-patch14-336'"),
        ({"checkpoint": "./nowhere"}, "is not a folder; give a folder with a config.json"),
        ({"checkpoint": VICUNA}, "unknown encoder family 'llama'"),
        ({"merge": "lln-layerscal"}, "did you mean 'lln-layerscale'"),
        ({"align": {"kind": "mlp", "hiden": 2}}, "did you mean 'hidden'"),
        ({"weights": "checkpont"}, "did you mean 'checkpoint'"),
        ({"final_norm": "afer"}, "did you mean 'after'"),
        ({"name": "my clip"}, "encoder name 'my clip' cannot be used"),
        ({"name": "dtype"}, "encoder name 'dtype' cannot be used"),
        ({"image_size": 300}, "image_size 300 is not a multiple of its patch size 14; set image_size to 294 or 308"),
    ],
)
def test_wrong_encoder_settings_are_one_line_errors(change, message):
    with pytest.raises(ValueError, match=message) as error:
        build_config([replace(PAPER[0], **change)], language_model=VICUNA)
    assert "\n" not in str(error.value)


def test_two_encoders_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two encoders are called 'clip'"):
        build_config([PAPER[0], replace(PAPER[1], name="clip")], language_model=VICUNA)


def test_unknown_weights_are_refused_with_the_way_out():
    with pytest.raises(CheckpointError, match="--weights random") as error:
        build_model(PAPER, language_model=VICUNA)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_checkpoints_are_refused(tmp_path, root):
    name = language_model_folder(root)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find_checkpoint(str(tmp_path))
    for text in ("{", '{"model_type": "no_such_model"}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"has no usable config\.json") as error:
            find_checkpoint(str(tmp_path))
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="not a causal language model"):
        build_config(comm_specs(root), language_model=encoder_folder(root, "vit"))
    encoder = AutoModel.from_pretrained(encoder_folder(root, "vit"))
    encoder.config.save_pretrained(tmp_path)
    spec = EncoderSpec("vit", str(tmp_path))
    with pytest.raises(CheckpointError, match="safetensors"):
        build_model([spec], language_model=name)
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle is not opened
    with pytest.raises(CheckpointError, match="safetensors"):
        build_model([spec], language_model=name)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken!!")
    with pytest.raises(CheckpointError, match="cannot be had"):
        build_model([spec], language_model=name)


def test_a_checkpoint_with_other_weights_than_its_config_is_refused(tmp_path, root):
    AutoModel.from_pretrained(encoder_folder(root, "vit")).save_pretrained(tmp_path)
    AutoModel.from_pretrained(encoder_folder(root, "dinov2")).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a dinov2 encoder"):
        build_model([EncoderSpec("dino", str(tmp_path))], language_model=language_model_folder(root))


def test_a_checkpoints_own_mean_and_std_win_over_its_familys(tmp_path, root):
    AutoModel.from_pretrained(encoder_folder(root, "dinov2")).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    name = language_model_folder(root)
    config = build_config([EncoderSpec("dino", str(tmp_path))], language_model=name)
    processor = build_processor(config, tiny_tokenizer())
    assert processor.image_processor.encoders[0]["mean"] == [0.1, 0.2, 0.3]
    assert processor.image_processor.encoders[0]["std"] == [0.4, 0.5, 0.6]
    said = {
        "do_normalize": False,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }  # as RADIO's page has it
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    config = build_config([EncoderSpec("dino", str(tmp_path))], language_model=name)
    shown = build_processor(config, tiny_tokenizer()).image_processor.encoders[0]
    assert (list(shown["mean"]), list(shown["std"])) == ([0, 0, 0], [1, 1, 1])


def test_a_tokenizers_own_image_token_is_used_and_a_missing_one_added(root):
    specs, name = comm_specs(root), language_model_folder(root)
    tokenizer = tiny_tokenizer()
    model = build_model(specs, language_model=name, tokenizer=tokenizer)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 4
    assert model.get_input_embeddings().weight.shape[0] == 64
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    bare = tiny_tokenizer()
    bare.add_tokens([f"w{index}" for index in range(60)])
    size = len(bare)
    grown = build_model(specs, language_model=name, tokenizer=bare)
    assert grown.get_input_embeddings().weight.shape[0] == grown.lm_head.weight.shape[0] == len(bare) == size


def test_heads_that_are_more_than_linear_are_refused():
    from transformers import Gemma2Config

    with pytest.raises(ValueError, match="final_logit_softcapping"):
        CommConfig(text_config=Gemma2Config())


def test_branches_that_do_not_fit_their_encoder_are_refused(root):
    config = AutoModel.from_pretrained(encoder_folder(root, "vit")).config
    branch = {"name": "e", "layers": [2], "image_size": 32}
    with pytest.raises(ValueError, match="has 4 of 4 blocks, but its deepest asked layer is 2"):
        CommVisionConfig(branches=[branch], e=config)
    with pytest.raises(ValueError, match="did you mean 'layers'"):
        CommVisionConfig(branches=[{**branch, "layer": 2}], e=config)
    with pytest.raises(ValueError, match="needs the config of its encoder"):
        CommVisionConfig(branches=[branch])
    with pytest.raises(ValueError, match="unknown encoder family 'llama'"):
        CommVisionConfig(branches=[branch], e=LlamaConfig())


@pytest.mark.parametrize(
    "code",
    [
        "import commvlm; from transformers import AutoConfig",
        pytest.param("import commvlm.model; from transformers import AutoConfig", marks=pytest.mark.slow),
    ],
)
def test_importing_the_package_registers_whatever_comes_first(code):
    check = f"{code}; assert AutoConfig.for_model('comm').__class__ is commvlm.CommConfig"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


def test_importing_the_package_alone_is_quick_because_it_loads_no_torch():
    check = "import sys, commvlm; assert commvlm.__version__; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
