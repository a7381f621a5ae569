"""Trained models of peers as models of this house: LLaVA-1.5 in the library's format, and Shikra."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedConfig

from .build import assemble_parts, settle_generation, weights_of
from .checkpoints import CheckpointError, find_checkpoint
from .config import CommConfig, CommVisionConfig
from .encoders import load_encoder, new_encoder
from .families import family_of, statistics, trained_size, truncate, vision_half
from .modeling import CommForConditionalGeneration

CLIP_GREY = (122, 116, 104)
"""CLIP's mean colour, with which LLaVA-1.5 was trained to make images square."""


def import_llava(path: str, *, dtype: torch.dtype = torch.float32) -> CommForConditionalGeneration:
    """A `LlavaForConditionalGeneration` checkpoint (hub id or folder, such as llava-hf/llava-1.5-7b-hf) as one branch of one
    layer: the same logits for the same pixels.

    Raises CheckpointError for the original format (mm_vision_tower), several layers, CLS tokens kept, an activation or an
    encoder that there is not here, and for weights that are not all there.
    """
    raw = _raw_config(path)
    if "mm_vision_tower" in raw:
        raise CheckpointError(
            f"{path!r} is in LLaVA's original format (mm_vision_tower); give the library's, such as llava-hf/llava-1.5-7b-hf"
        )
    if raw.get("model_type") != "llava":
        raise CheckpointError(
            f"{path!r} is a {raw.get('model_type')!r}, not a 'llava'; give one such as llava-hf/llava-1.5-7b-hf"
        )
    config: Any = AutoConfig.from_pretrained(path)
    layer = _llava_layer(path, config)
    with weights_of(path):
        load: Any = LlavaForConditionalGeneration.from_pretrained
        whole, report = load(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    _need_all(path, report["missing_keys"])
    vision = _one_branch(path, config.vision_config, layer)
    comm = CommConfig(
        vision_config=vision, text_config=config.text_config, project={"kind": "mlp", "hidden": 1},
        image_token_id=config.image_token_id, pad_color=list(CLIP_GREY),
    )  # fmt: skip
    encoder = new_encoder(vision.encoder_config("clip"), dtype=dtype)
    given = whole.model.vision_tower.state_dict()
    encoder.load_state_dict({name: given[name] for name in encoder.state_dict()})
    model = assemble_parts(comm, {"clip": encoder}, whole.model.language_model, whole.lm_head, dtype=dtype)
    projector: Any = whole.model.multi_modal_projector
    _fill(model.model.multi_modal_projector, [projector.linear_1, projector.linear_2])
    settle_generation(model, None)
    return model.eval()


def _llava_layer(path: str, config: Any) -> int:
    """The one layer that is read, 1-based. The library counts the embeddings as 0 and the last block as -1."""
    depth, asked = config.vision_config.num_hidden_layers, config.vision_feature_layer
    if not isinstance(asked, int):
        raise CheckpointError(f"{path!r} reads layers {asked} side by side; one layer can be imported")
    if config.vision_feature_select_strategy != "default":
        raise CheckpointError(
            f"{path!r} keeps the CLS token (vision_feature_select_strategy); we read patch tokens alone"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise CheckpointError(f"{path!r} projects by {config.projector_hidden_act!r}; we import GELU with biases alone")
    layer = asked if asked > 0 else depth + 1 + asked
    if not 1 <= layer <= depth:
        raise CheckpointError(f"{path!r} reads layer {asked} of {depth} (vision_feature_layer); we read 1 to {depth}")
    return layer


def import_shikra(
    path: str, *, vision: str | None = None, image_patch_id: int, frame_ids: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> CommForConditionalGeneration:  # fmt: skip
    """A Shikra checkpoint (its delta already added to LLaMA, weights as safetensors) as one branch of one layer, its
    <im_start> and <im_end> embeddings as the frame: the same logits for the same pixels.

    vision: CLIP's hub id or folder, by default the one that the checkpoint names. image_patch_id, frame_ids: of <im_patch>,
    and of <im_start> and <im_end>, in its tokenizer. Raises CheckpointError for anything else.
    """
    raw = _raw_config(path)
    if raw.get("model_type") != "shikra":
        raise CheckpointError(f"{path!r} is a {raw.get('model_type')!r}, not a 'shikra'")
    vision = vision or raw.get("mm_vision_tower")
    if not vision:
        raise CheckpointError(f"{path!r} names no vision encoder (mm_vision_tower); say which with --vision")
    known = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "dtype"}
    text = LlamaConfig(**{name: value for name, value in raw.items() if name in known})
    with weights_of(path):
        load: Any = LlamaForCausalLM.from_pretrained
        whole, report = load(path, config=text, dtype=dtype, use_safetensors=True, output_loading_info=True)
    _need_all(path, report["missing_keys"])
    clip = vision_half(find_checkpoint(vision).config)
    depth, asked = family_of(clip).depth(clip), int(raw.get("mm_vision_select_layer", -2))
    branch = _one_branch(vision, clip, asked if asked > 0 else depth + 1 + asked)
    comm = CommConfig(
        vision_config=branch, text_config=text, project="linear", frame="learned", image_token_id=image_patch_id
    )
    with weights_of(vision):
        encoder = load_encoder(vision, branch.encoder_config("clip"), dtype=dtype)
    model = assemble_parts(comm, {"clip": encoder}, whole.model, whole.lm_head, dtype=dtype)
    linear = nn.Linear(branch.hidden_size, text.hidden_size, dtype=dtype)
    linear.load_state_dict(_tensors(path, {"weight": "model.mm_projector.weight", "bias": "model.mm_projector.bias"}))
    _fill(model.model.multi_modal_projector, [linear])
    frame: Any = model.model.image_frame
    with torch.no_grad():
        frame.weight.copy_(whole.model.embed_tokens.weight[list(frame_ids)])
    settle_generation(model, None)
    return model.eval()


def _raw_config(path: str) -> dict[str, Any]:
    """A checkpoint's config.json as it stands. Raises CheckpointError where there is none."""
    file: Any = Path(path) / "config.json"
    if not Path(path).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(path, "config.json")
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise CheckpointError(
                f"checkpoint {path!r} is no folder and could not be had from the hub ({reason})"
            ) from error
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {path!r} has no usable config.json: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path!r} has no usable config.json: it holds no object")
    return content


def _one_branch(path: str, config: PreTrainedConfig, layer: int) -> CommVisionConfig:
    mean, std = statistics(config)
    known = find_checkpoint(path)
    size = trained_size(config)
    branch = {
        "name": "clip", "depth": family_of(config).depth(config), "layers": [layer], "merge": "mean",
        "image_size": size, "mean": known.mean or mean, "std": known.std or std,
    }  # fmt: skip
    encoder: Any = {"clip": truncate(config, layer)}
    return CommVisionConfig(branches=[branch], **encoder)


def _need_all(path: str, missing: Any) -> None:
    if missing:
        raise CheckpointError(f"{path!r} lacks {len(missing)} weights (first: {sorted(missing)[0]}); download it again")


def _fill(projection: nn.Module, given: list[Any]) -> None:
    """Weights of the given Linears into the projection's, in order."""
    ours = [module for module in projection.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for target, source in zip(ours, given, strict=True):
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)


def _tensors(path: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Single tensors of a folder's safetensors files: our name -> theirs. Raises CheckpointError for one that lacks."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                present = set(opened.keys())
                found |= {ours: opened.get_tensor(theirs) for ours, theirs in names.items() if theirs in present}
        except SafetensorError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    for ours, theirs in names.items():
        if ours not in found:
            raise CheckpointError(
                f"{path!r} has no {theirs} in its safetensors files; is it Shikra with its delta added?"
            )
    return found
