"""LoRA and QLoRA: a part learns through low-rank adapters beside its own weights (peft).

The adapters go into the model itself, so that everything else (merges, alignments, projection) stays as it is, is trained
whole where `trains` names it, and a checkpoint holds exactly what is trained. In the end they are added to the weights
that they stood beside, and the model is a plain one again.
Sources: Hu et al., LoRA, arXiv 2106.09685; Dettmers et al., QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from ..model.modeling import CommForConditionalGeneration
from ..model.vision import learns
from .keys import RecipeError
from .recipe import Lora

NAME = "default"
FILE = "trained.safetensors"
"""In a checkpoint: every weight that is trained, and what BatchNorms gathered, by its name in the model."""


class Adapters:
    """The adapters of a model, from their making until they are merged."""

    def __init__(self, model: CommForConditionalGeneration, lora: Lora, *, seed: int, dtype: torch.dtype) -> None:
        """Puts adapters beside the linear layers that `lora` names; those layers are held in 4 bits if it says so, computing
        in `dtype`. Raises RecipeError where there is no such layer, and for 4 bits without bitsandbytes."""
        self.model = model
        self.plain = _targets(model, lora)
        if lora.bits == 4:
            _hold_in_4_bits(model, self.plain, dtype)
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(self.plain)
        )  # type: ignore[arg-type]
        held: Any = model
        held.is_loaded_in_4bit = lora.bits == 4  # how peft knows which of its layers to take
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)  # type: ignore[arg-type]
        del held.is_loaded_in_4bit

    def merge(self) -> None:
        """Adds what the adapters learned to the layers' own weights (never to their 4 bits), and takes them out."""
        for name, plain in self.plain.items():
            layer: Any = self.model.get_submodule(name)
            assert isinstance(layer, LoraLayer)
            weight = plain.weight.data
            weight += layer.get_delta_weight(NAME).to(weight)  # type: ignore[operator]
            self.model.set_submodule(name, plain)
        del self.model.peft_config

    def merged(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same on the weights of the whole model by name, where the model itself holds shards of them."""
        for name in self.plain:
            layer: Any = self.model.get_submodule(name)
            down, up = (state.pop(f"{name}.{which}.{NAME}.weight") for which in ("lora_A", "lora_B"))
            weight = state.pop(f"{name}.base_layer.weight")
            state[f"{name}.weight"] = weight + layer.scaling[NAME] * (up @ down).to(weight)
            if f"{name}.base_layer.bias" in state:
                state[f"{name}.bias"] = state.pop(f"{name}.base_layer.bias")
        return state


def _targets(model: CommForConditionalGeneration, lora: Lora) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name: never the head, which is no layer of the language model's body."""
    owned = {id(m) for part in lora.parts for m in model.parts()[part].modules()}
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in owned and module is not model.lm_head
    }
    if lora.targets == "all-linear":
        return linear
    wanted = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    kinds = {name.rsplit(".", 1)[-1] for name in linear}
    for target in wanted:
        if target not in kinds:
            raise RecipeError(f"lora.targets names no layer {target!r}; layers: all-linear, {', '.join(sorted(kinds))}")
    return {name: module for name, module in linear.items() if name.rsplit(".", 1)[-1] in wanted}


def check_bits(bits: int) -> None:
    """Raises RecipeError where 4 bits are wanted and bitsandbytes is not there."""
    if bits == 4 and find_spec("bitsandbytes") is None:
        raise RecipeError("lora.bits 4 needs bitsandbytes: pip install 'commvlm[qlora]', or say bits 16")


def _hold_in_4_bits(model: nn.Module, layers: Mapping[str, nn.Linear], dtype: torch.dtype) -> None:
    """NormalFloat4 with double quantization in place of the layers' weights; quantized as they move to their device."""
    check_bits(4)
    from bitsandbytes.nn import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]

    for name, linear in layers.items():
        held = Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        held.weight = Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4", module=held)
        if linear.bias is not None:
            held.bias = linear.bias
        model.set_submodule(name, held)


def save_trained(model: nn.Module, folder: Path) -> None:
    """Every weight that is trained, and the statistics of BatchNorms that are, as `folder`/FILE."""
    learned = _trained(model) | _statistics(model)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()}, folder / FILE)


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """What `save_trained` saved back in its places; statistics are left alone where the file, an older one, has none. Raises
    ValueError where the weights are not exactly those trained."""
    saved = load_file(folder / FILE)
    trained, statistics = _trained(model), _statistics(model)
    odd = sorted((saved.keys() - statistics.keys()) ^ trained.keys())
    if odd:
        raise ValueError(f"{folder} does not hold what is trained here ({len(odd)} names differ, first: {odd[0]})")
    places = trained | statistics
    for name, tensor in saved.items():
        places[name].copy_(tensor)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of BatchNorms that are trained, by their names in the model."""
    norms = {n: module for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and learns(module)}
    return {f"{n}.{name}": buffer for n, norm in norms.items() for name, buffer in norm.named_buffers()}
