"""A trained model's folder: found, checked, loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from ..model import CommForConditionalGeneration, CommProcessor

WHOLE = ("model.vision_tower", "model.multi_modal_projector", "model.image_frame", "lm_head")
"""Parts that keep their precision when the language model is loaded in 8 or 4 bits."""


def resolve_checkpoint(path: Path | str) -> Path:
    """The model's folder: `path` itself, or what the run.json of a run (or of a demo) in `path` names.

    Raises ValueError for anything else, with the next step.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no checkpoint: there is no such folder; give a folder made by `commvlm train`")
    if (path / "config.json").is_file():
        kind = _read_object(path / "config.json").get("model_type")
        if kind != "comm":
            raise ValueError(
                f"{path} is no COMM checkpoint: its config.json says model_type {kind!r}, not 'comm'; "
                "give a folder made by `commvlm train`"
            )
        return path
    if (path / "run.json").is_file():
        named = _read_object(path / "run.json").get("model")
        if (
            not isinstance(named, str)
            or Path(named).is_absolute()
            or ".." in Path(named).parts
            or Path(named) == Path()
        ):
            raise ValueError(f"{path / 'run.json'} names the model {named!r}, which is no folder inside {path}")
        return resolve_checkpoint(path / named)
    if (path / "recipe.yaml").is_file():
        raise ValueError(f"{path} is an unfinished run; the same `commvlm train` command goes on with it")
    raise ValueError(
        f"{path} is no checkpoint: no config.json and no run.json in it; give a folder made by `commvlm train`"
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder with a config.json holds a COMM model."""
    return _read_object(folder / "config.json").get("model_type") == "comm"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({one_line(error)}); make the checkpoint again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object; make the checkpoint again")
    return content


def load_checkpoint(
    path: Path | str, *, bits: int | None = None, device: str = "cpu"
) -> tuple[CommForConditionalGeneration, CommProcessor]:
    """Model (in eval mode, in the dtype it was saved in) and processor. Reads safetensors only and runs no code of the
    folder. bits: 8 or 4 for the language model's linear layers through bitsandbytes, which is placed on its device at once;
    None leaves every weight as it is. Raises ValueError for a folder that is no checkpoint, whose weights are broken or not
    all there, and for bits without bitsandbytes."""
    folder = resolve_checkpoint(path)
    load: Any = partial(CommForConditionalGeneration.from_pretrained, **_quantised(bits, device))
    try:
        with quietly():
            model, report = load(folder, use_safetensors=True, local_files_only=True, output_loading_info=True)
            processor = CommProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"checkpoint {folder} cannot be loaded ({one_line(error)}); copy or train it again") from error
    lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lacking:
        raise ValueError(
            f"checkpoint {folder} lacks {len(lacking)} weights (first: {lacking[0]}): its config.json and its weights "
            "do not belong together; copy or train it again"
        )
    return model.eval(), processor


def device_named(name: str | None) -> torch.device:
    """The device of that name; the GPU by default where there is one. Raises ValueError for what is none."""
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: {one_line(error)}") from error


def placed(model: Any, device: torch.device) -> Any:
    """The model on that device. Raises ValueError where there is none, or not enough memory."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r}: {one_line(error)}; choose another --device") from error


def round_linears(model: nn.Module) -> None:
    """The weights of Linears in bfloat16, once: autocast would round them so at every step (its cache knows nothing of
    inference mode), and every product is the same. A head that shares its weight with the embedding keeps it."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if type(module) is nn.Linear and id(module.weight) not in shared:
            module.to(torch.bfloat16)


def _quantised(bits: int | None, device: str) -> dict[str, Any]:
    """What `from_pretrained` is told; nothing for weights as they are."""
    if bits is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{bits}-bit weights need bitsandbytes: pip install 'commvlm[quantize]'")
    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")  # at every layer of every step
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=list(WHOLE)
    )
    return {"quantization_config": config, "device_map": {"": device}}


@contextmanager
def quietly() -> Iterator[None]:
    """Without the library's bars and warnings: what it would warn about on loading is an error here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")[:200]
