"""One contract for every encoder: pixels -> patch tokens of the asked layers.

Layer k is what the k-th block gives out, before the encoder's final norm, its prefix tokens (CLS, registers) removed. Layers
are handed over as their blocks finish, so that nobody has to hold more of them than are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, MetaClip2VisionConfig, MetaClip2VisionModel, PreTrainedConfig, PreTrainedModel

from .checkpoints import find_checkpoint
from .families import FINAL_NORMS, family_of, trained_size, truncate, vision_half
from .names import choice

AutoModel.register(MetaClip2VisionConfig, MetaClip2VisionModel, exist_ok=True)  # the library has but the whole


def check_final_norm(config: PreTrainedConfig, final_norm: str, *, name: str, deepest: int, depth: int) -> None:
    """Raises ValueError when "after" is asked where it cannot be given.

    deepest: the deepest asked layer. depth: blocks of the whole encoder, of which `config` may have fewer.
    """
    if choice(final_norm, of=FINAL_NORMS, what=f"final_norm of encoder {name!r}") == "before":
        return
    if not family_of(config).normed(config):
        raise ValueError(
            f"encoder {name!r}: final_norm 'after' is not available for {config.model_type}, which has no final norm of "
            "its patch tokens; use final_norm 'before'"
        )
    if deepest != depth:
        raise ValueError(
            f"encoder {name!r}: final_norm 'after' needs the last layer, {depth}, but the deepest asked one is "
            f"{deepest}; add the last layer or use final_norm 'before'"
        )


def new_encoder(config: PreTrainedConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A frozen encoder with random weights. dtype: None is what the config says, or else torch's default."""
    options = dict(family_of(config).build) if dtype is None else {**family_of(config).build, "dtype": dtype}
    return freeze(AutoModel.from_config(config, **options))


def load_encoder(checkpoint: str, config: PreTrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen encoder with the weights of `checkpoint` (hub id or folder; safetensors), as deep as `config` says, and of
    its image size, where an encoder has but one.

    Raises ValueError when the checkpoint lacks any weight of the encoder.
    """
    family = family_of(config)
    stored = config
    if family.resize is not None:
        stored = truncate(vision_half(find_checkpoint(checkpoint).config), family.depth(config))
    encoder, report = AutoModel.from_pretrained(
        checkpoint,
        config=stored,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported, and refused below
        output_loading_info=True,
        **family.build,
    )
    lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"checkpoint {checkpoint!r} lacks {len(lacking)} weights of a {config.model_type} encoder "
            f"(first: {lacking[0]}); check that its config.json belongs to its weights"
        )
    if family.resize is not None and trained_size(stored) != trained_size(config):
        family.resize(encoder, trained_size(config))
        for name, value in family.sized(family.fields(encoder.config), trained_size(config)).items():
            setattr(encoder.config, name, value)
    return freeze(encoder)


def freeze(encoder: PreTrainedModel) -> PreTrainedModel:
    """The encoder itself, in eval mode, none of its parameters trained."""
    return encoder.requires_grad_(False).eval()


def _adapts(encoder: nn.Module) -> bool:
    """Whether adapters in it (peft's) learn; its own weights never do."""
    return any(p.requires_grad and ".lora_" in name for name, p in encoder.named_parameters())


def stream_layers(
    encoder: PreTrainedModel,
    pixels: Tensor,
    *,
    layers: Sequence[int],
    take: Callable[[int, Tensor], None],
    final_norm: str = "before",
) -> None:
    """Runs the encoder, outside any graph unless adapters in it learn, and hands over the patch tokens of each asked layer
    as its block finishes.

    pixels: (b, 3, H, W), normalised for this encoder. layers: ascending, 1-based; the encoder has no block beyond the last
    of them. take: called with (0-based place among the asked layers, tokens (b, n, d), n = rows x columns of patches),
    under the caller's own gradient mode; it must not write to the tokens, which the next block reads. final_norm: "after"
    puts the last of them through the encoder's final norm.
    """
    family = family_of(encoder.config)
    blocks = family.blocks(encoder)
    prefix = family.prefix(encoder.config)
    learning = torch.is_grad_enabled()
    early = layers if final_norm == "before" else layers[:-1]

    def hand_over(place: int) -> Callable[..., None]:
        def hook(_block: nn.Module, _inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            with torch.set_grad_enabled(learning):
                take(place, state[:, prefix:])

        return hook

    hooks = [blocks[layer - 1].register_forward_hook(hand_over(place)) for place, layer in enumerate(early)]
    try:
        with torch.set_grad_enabled(learning and _adapts(encoder)):
            output = encoder(**family.inputs(pixels, encoder.config), return_dict=True, **family.call)
    finally:
        for hook in hooks:
            hook.remove()
    if final_norm == "after":
        take(len(layers) - 1, output.last_hidden_state[:, prefix:])


def read_layers(
    encoder: PreTrainedModel, pixels: Tensor, *, layers: Sequence[int], final_norm: str = "before"
) -> list[Tensor]:
    """[layer](b, n, d): the patch tokens of the asked layers, all held at once; see `stream_layers`."""
    states: list[Tensor] = []
    stream_layers(
        encoder, pixels, layers=layers, take=lambda _place, state: states.append(state), final_norm=final_norm
    )
    return states
