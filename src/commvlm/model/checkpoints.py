"""Named checkpoints: where their configs come from, so that shapes are known before (and without) any weights."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from .names import nearest

Triple = tuple[float, float, float]


class CheckpointError(ValueError):
    """A checkpoint that is not there, or is none."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint without reading its weights.

    source: "folder", "hub cache", "hub" or "facts". mean, std: what its own image processor says, when it says so.
    """

    name: str
    config: PreTrainedConfig
    source: str
    mean: Triple | None = None
    std: Triple | None = None


@cache
def published_facts() -> dict[str, dict[str, Any]]:
    """The published configs that are shipped with this package: hub id -> {"config", "image_mean", "image_std"}."""
    folder = resources.files("commvlm.model") / "facts"
    return {
        entry.name.removesuffix(".json").replace("--", "/"): json.loads(entry.read_text(encoding="utf-8"))
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    }


def ask_hub(name: str) -> None:
    """Puts the config of a checkpoint whose facts are shipped into the hub's cache, if the hub can be reached: from then on
    `find_checkpoint` says the same, before and after its weights are fetched."""
    if name in published_facts() and not Path(name).is_dir():
        with suppress(OSError, ValueError):
            AutoConfig.from_pretrained(name)


def find_checkpoint(name: str) -> Checkpoint:
    """A checkpoint by folder or hub id. A folder wins, then the hub's cache, the shipped facts, and the hub itself.

    Raises CheckpointError for a folder that holds no checkpoint and for a name that none of these knows.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(name, folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"checkpoint {name!r} is not a folder; give a folder with a config.json, or a hub id")
    for local in (True, False):
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=local)
        except ImportError as error:
            raise CheckpointError(f"checkpoint {name!r} needs timm: pip install 'commvlm[timm]'") from error
        except StrictDataclassError as error:
            raise CheckpointError(f"checkpoint {name!r} has no usable config.json: {_first_line(error)}") from error
        except (OSError, ValueError) as error:
            reason = error
        else:
            mean, std = _image_statistics(name)
            return Checkpoint(name, config, "hub cache" if local else "hub", mean, std)
        if name in published_facts():
            return _from_facts(name)
    raise CheckpointError(
        f"checkpoint {name!r} is no folder and could not be had from the hub ({_first_line(reason)}); "
        f"shapes known without the hub: {nearest(name, get_close_matches(name, published_facts(), n=4, cutoff=0))}"
    )


def _from_folder(name: str, folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint folder {name!r} has no config.json; give the folder that save_pretrained wrote"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except ImportError as error:
        raise CheckpointError(f"checkpoint {name!r} needs timm: pip install 'commvlm[timm]'") from error
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"checkpoint folder {name!r} has no usable config.json: {_first_line(error)}") from error
    mean, std = _image_statistics(str(folder))
    return Checkpoint(name, config, "folder", mean, std)


def _from_facts(name: str) -> Checkpoint:
    facts = published_facts()[name]
    fields = dict(facts["config"])
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    return Checkpoint(name, config, "facts", facts.get("image_mean"), facts.get("image_std"))


def _image_statistics(name: str) -> tuple[Triple | None, Triple | None]:
    """mean and std from a checkpoint's preprocessor_config.json (a folder's, the hub cache's, or the hub's); None, None when
    it has none. Raises CheckpointError for one that is no JSON object."""
    file = _at_hand_or_fetched(name, "preprocessor_config.json")
    if file is None:
        return None, None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        if settings.get("do_normalize") is False:  # its mean and std, if it says any, are not applied
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return settings.get("image_mean"), settings.get("image_std")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {name!r}: its preprocessor_config.json is no JSON object") from error


def _at_hand_or_fetched(name: str, file: str) -> str | None:
    """A folder's file, or the hub's; None where there is none, or the hub cannot be asked. What was once found, or found not
    to be there, is not asked for again."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return str(Path(name) / file) if (Path(name) / file).is_file() else None
    known: Any = try_to_load_from_cache(name, file)
    if known is None:
        known = cached_file(
            name, file, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    return known if isinstance(known, str) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
