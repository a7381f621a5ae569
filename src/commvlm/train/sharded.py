"""FSDP2 through accelerate: what it needs said, and a look at whether it happened."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import get_module_class_from_name
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..model.modeling import CommForConditionalGeneration
from .adapters import Adapters


def fsdp_config(model: CommForConditionalGeneration, *, checkpointing: bool) -> dict[str, Any]:
    """One unit for each block of the language model and of the encoders, checkpoints in shards."""
    names = sorted(model._no_split_modules or ())
    return {
        "version": 2,
        "reshard_after_forward": True,
        "transformer_layer_cls_to_wrap": [name for name in names if get_module_class_from_name(model, name)],
        "state_dict_type": "SHARDED_STATE_DICT",
        "activation_checkpointing": checkpointing,
    }


def settle_state(trainer: Any) -> None:
    """accelerate makes FSDP on accelerators only and on CPUs silently falls back to DDP; torch shards on CPUs as well. In
    bfloat16 it would also sum gradients over processes, and give the loss, in that; here both are in fp32, as in DDP."""
    state: Any = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        trainer.is_fsdp_enabled = True
    if state._mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        state.fsdp_plugin.mixed_precision_policy = policy


def check_sharded(model: nn.Module) -> None:
    """Raises RuntimeError where a parameter is whole on every process: sharding that did not happen says nothing itself."""
    loose = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if loose:
        raise RuntimeError(f"FSDP did not shard {len(loose)} parameters (first: {loose[0]})")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, put together where it is sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(trainer: Any, adapters: Adapters | None) -> CommForConditionalGeneration:
    """The trained model whole on the first process, its adapters merged, without weights on the others; every process must
    ask."""
    model: CommForConditionalGeneration = trainer.model
    state = {}
    if trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.deepspeed) or {}
        unset_hf_deepspeed_config()  # with it the library shares out every model that is made from here on
    else:
        for name, tensor in model.state_dict().items():
            full = whole(tensor)
            if trainer.args.process_index == 0:
                state[name] = full.cpu()
    with torch.device("meta"):
        found = CommForConditionalGeneration._from_config(model.config)
    if state:
        found.load_state_dict(state if adapters is None else adapters.merged(state), assign=True)
        found.tie_weights()
    found.generation_config = model.generation_config
    return found


def layer_weights(model: CommForConditionalGeneration) -> dict[str, dict[int, float]]:
    """`model.layer_weights()`, of a sharded model as well; every process must ask."""
    if not isinstance(model, FSDPModule):
        return model.layer_weights()
    model.unshard()
    weights = model.layer_weights()
    model.reshard()
    return weights
