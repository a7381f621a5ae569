"""The recipe: one YAML file says which model, which data, how it is trained and on what it is evaluated.

Frozen dataclasses (see `filling`): types are checked, every key can be overridden on the command line by its dotted
name, and an unknown key is an error that names the nearest known one (see `keys`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from .filling import filled
from .keys import COMMAND_LINE, RecipeError, check_keys, fields_of, merged, override

SAFE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's, five to ten times as fast, where PyYAML was built with it."""


@dataclass(frozen=True)
class Encoder:
    """One encoder's branch.

    name: its own, such as "clip". checkpoint: hub id, folder, or "micro:clip" for one of the shipped tiny ones. layers:
    1-based block outputs: 12, -1, "19-24", "all", "half", or a list. merge, align: a kind, or {kind: ..., options}.
    image_size: side in pixels of its image (its own by default). weights: "checkpoint" or "random". final_norm: "before"
    or "after", for its last block.
    """

    name: str
    checkpoint: str
    layers: int | str | list[int | str] = "all"
    merge: str | dict[str, Any] = "lln-layerscale"
    align: str | dict[str, Any] = "identity"
    image_size: int | None = None
    weights: str = "checkpoint"
    final_norm: str = "before"


@dataclass(frozen=True)
class Model:
    """encoders -> fuse -> reduce -> project -> language_model (hub id, folder, or "micro:lm").

    fuse: a kind, or {kind: ..., options}; its option `grid` (an encoder's name, a side, or [rows, columns]) is what encoders
    of other grids are resampled to. reduce: "none", "pixel-shuffle" or "pool". frame: "learned" puts an embedding before and
    one after an image's tokens, "none" does not. pad_color: RGB of what makes an image square.
    """

    encoders: list[Encoder]
    language_model: str
    fuse: str | dict[str, Any] = "channel-concat"
    reduce: str | dict[str, Any] = "none"
    project: str | dict[str, Any] = "linear"
    frame: str = "none"
    pad_color: list[int] = field(default_factory=lambda: [255, 255, 255])


@dataclass(frozen=True)
class Source:
    """One annotation file, or the pair of them that a format needs.

    format: a reader (`commvlm.data.readers.READERS`). images: folder of the images. files: the reader's files by its
    argument's name. options: its other arguments. weight: share of the draws in training. Paths are under data.root.
    """

    name: str
    format: str
    images: str
    files: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Data:
    """root: the folder that all paths are under (the recipe's own by default). group: questions about one image that are
    drawn, and packed behind it, together; 1 draws each on its own. pixels: "given", "grey" for the
    blind control, or "shuffled" (another image in its place).
    mixes: trees over the sources by name, for the stages (see `commvlm.data.mix`). prompts: "short" (what the micro world's
    language model knows) or "wide". held_out: sources like the others whose images are not to be trained on; examples about
    them are left out of the sources. faults: what becomes of entries, images and dialogues that cannot be used: "refuse", or
    "skip", which leaves them out, counts them and trains on others; in what is evaluated they are always refused. workers:
    processes that read ahead."""

    sources: list[Source] = field(default_factory=list)
    root: str = ""
    group: int = 1
    mixes: dict[str, Any] = field(default_factory=dict)
    prompts: Literal["short", "wide"] = "short"
    faults: Literal["refuse", "skip"] = "refuse"
    held_out: list[Source] = field(default_factory=list)
    workers: int = 0
    pixels: Literal["given", "grey", "shuffled"] = "given"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: the parts named here learn through them, at the rate that `trains` gives the part, and their own
    weights stay. rank: 0 for none. alpha: what they add is scaled by alpha / rank. targets: "all-linear", or names of
    layers such as [q_proj, v_proj]. bits: 4 holds the layers' own weights in NF4 (QLoRA, extra `qlora`)."""

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    parts: list[str] = field(default_factory=lambda: ["language_model"])
    targets: str | list[str] = "all-linear"
    bits: Literal[16, 4] = 16


@dataclass(frozen=True)
class Stage:
    """trains: part -> learning rate; every part that is not named is frozen. Parts: merge, align, project, language_model;
    encoders only through lora. batch: images of one update, over all processes; micro_batch: at most how many of them at
    once on one. weights: source -> weight, in place of the sources' own. mix: one of data.mixes, in place of weights.
    warmup: share of the steps over which the rates rise from 0, under every schedule; schedule: how they go on ("constant"
    and "constant_with_warmup" are one). decay: weight decay. clip: the gradient's largest norm, 0 for none. spike: a step
    whose loss is over so many times the last logged mean stops the run, as one that is no number always does."""

    name: str
    steps: int
    batch: int
    trains: dict[str, float]
    micro_batch: int | None = None
    warmup: float = 0.03
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    weights: dict[str, float] = field(default_factory=dict)
    mix: str = ""
    decay: float = 0.0
    clip: float = 1.0
    spike: float | None = None
    lora: Lora = field(default_factory=Lora)


@dataclass(frozen=True)
class Train:
    """optimizer: "adamw", or "muon", which steps on all hidden matrices at the same rates and leaves words, vectors and
    kernels to AdamW (engine "ddp" alone). attention: of the language model: over padded rows "sdpa", "eager", or "auto",
    which is FlashAttention 2 where its package and a GPU are (extra `gpu`, data.group 1) and "sdpa" elsewhere; over packed
    rows, which are not padded, "shared-prefix", "flex_attention", or "packed" for whichever of them suits the machine.
    save_every, log_every: in steps. visual_scale: size of the visual tokens at the start, as a multiple of the word
    embeddings'; None leaves the projection as it is initialised. features: a folder that `commvlm probe features` made of
    this recipe; its features are read in training, and no encoder is run. engine: how several processes share the work:
    "ddp" (each has the whole model), "fsdp" (each has a part of every weight), "zero2" or "zero3" (DeepSpeed's, extra
    `deepspeed`). checkpointing: computes activations again in the backward pass in place of keeping them. compile: parts
    that torch.compile compiles (encoders, merge, align, project, language_model). start: a run or a saved model whose
    weights the first stage starts from, in place of the parts' own. report_to: "tensorboard", "trackio", "wandb" (extra
    `track`), beside log.jsonl."""

    stages: list[Stage] = field(default_factory=list)
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: Literal["adamw", "muon"] = "adamw"
    attention: str = "sdpa"
    max_length: int | None = 2048
    visual_scale: float | None = None
    features: str | None = None
    save_every: int = 500
    log_every: int = 10
    keep: int = 2
    engine: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    checkpointing: bool = False
    compile: list[str] = field(default_factory=list)
    start: str = ""
    report_to: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluate:
    """sources: what is asked, through the same readers; their task is the examples' own. batch: questions answered at once.
    rules: task -> a rule other than its default, such as {caption: ptb}. precision: of the answering. codec, geometry: how
    a model of the library's writes boxes (`data.boxes.CODECS`, `data.geometry.GEOMETRIES`). knock_out: encoders and layers
    that are switched off, such as "dinov2" or "clip:1-8, dinov2:24"; such answers are kept apart from the whole model's."""

    sources: list[Source] = field(default_factory=list)
    batch: int = 32
    max_new_tokens: int = 64
    rules: dict[str, str] = field(default_factory=dict)
    precision: Literal["fp32", "bf16"] = "fp32"
    codec: str = "shikra3"
    geometry: str = "pad-square"
    knock_out: str = ""


@dataclass(frozen=True)
class Recipe:
    """name, model, data, train, evaluate: see each."""

    name: str
    model: Model
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package: name ("micro", "peers/llava-1.5-7b") -> the comment at its head, one line."""
    shipped = Path(str(resources.files("commvlm") / "recipes"))
    found = {}
    for path in sorted(shipped.rglob("*.yaml")):
        lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        about = " ".join(line.lstrip("# ") for line in lines)
        found[path.relative_to(shipped).as_posix().removesuffix(".yaml")] = about
    return found


def find_recipe(name: str | Path) -> Path:
    """A file's path, or a shipped recipe's by name: "micro", "recipes/comm-7b.yaml". Raises RecipeError for neither."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(str(resources.files("commvlm") / "recipes"))
    parts = path.parts[1:] if path.parts[:1] == ("recipes",) else path.parts
    if parts and ".." not in parts and not path.is_absolute():
        found = shipped.joinpath(*parts[:-1], parts[-1].removesuffix(".yaml") + ".yaml")
        if found.is_file():
            return found
    known = list(shipped_recipes())
    near = get_close_matches(Path(*parts).as_posix().removesuffix(".yaml") if parts else "", known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise RecipeError(
        f"there is no recipe {str(name)!r}; {hint}give a YAML file, or a name that `commvlm recipes` lists"
    )


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with command-line overrides such as `--train.seed 1` on top (see `keys.override`).

    A file that says `extends: other.yaml` is that recipe (a path from its own folder, or a shipped one's name) with its own
    keys on top: mappings key by key, everything else as a whole. data.root is made absolute: relative to where the command
    runs when overridden, to the recipe's folder in the file. Raises RecipeError with file, key and the nearest valid one.
    """
    path = find_recipe(name)
    content = _read(path, ())
    if not overrides:
        return _parse(content, path.name)
    changed = override(content, overrides, Recipe)
    try:
        return _parse(changed, COMMAND_LINE)
    except RecipeError:
        _parse(content, path.name)  # the file's own fault is told as such
        raise


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """A file's content on top of what it extends, its paths absolute. below: the files that led here."""
    if path in below:
        raise RecipeError(f"{path}: extends itself, by way of {', '.join(p.name for p in below)}")
    content = read_yaml(path)
    extends = content.pop("extends", None)
    check_keys(content, Recipe, where=path.name)
    data = content.get("data", {})
    rooted = isinstance(data, dict) and ("root" in data or extends is None)
    if rooted and isinstance(data.get("root", ""), str):  # other types are told later
        content["data"] = {**data, "root": str((path.parent / data.get("root", "")).resolve())}
    if extends is None:
        return content
    if not isinstance(extends, str):
        raise RecipeError(f"{path.name}: extends must name a recipe, it is {extends!r}")
    beside = path.parent / extends
    return merged(_read(beside if beside.is_file() else find_recipe(extends), (*below, path)), content)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; RecipeError with the line otherwise."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=SAFE)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise RecipeError(f"{path}{line}: not YAML ({error.problem})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not YAML ({error})".splitlines()[0]) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(fields_of(Recipe))}")
    return content


def _parse(content: Mapping[str, Any], where: str) -> Recipe:
    recipe = filled(content, Recipe, where)
    root = str(Path(recipe.data.root).resolve())
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=root))


def as_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out: `load_recipe` gives the same back."""
    return yaml.dump(dataclasses.asdict(recipe), Dumper=DUMPER, sort_keys=False, allow_unicode=True)


def difference(was: Recipe, now: Recipe, *, most: int = 8) -> str:
    """Every key in which two recipes differ, with both values, in one line; items of lists by their names."""
    found = list(_differences(was, now, ""))
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def _differences(was: Any, now: Any, key: str) -> Iterator[str]:
    if dataclasses.is_dataclass(now):
        for name in fields_of(type(now)):
            yield from _differences(getattr(was, name), getattr(now, name), f"{key}.{name}" if key else name)
    elif _names(was) and _names(was) == _names(now):
        for name, a, b in zip(_names(was), was, now, strict=True):
            yield from _differences(a, b, f"{key}.{name}")
    elif was != now:
        yield f"{key}: {_short(_names(was) or was)} there, {_short(_names(now) or now)} now"


def _names(value: Any) -> list[str]:
    """The names of a list's items; none of anything else."""
    named = isinstance(value, list) and all(dataclasses.is_dataclass(item) for item in value)
    return [item.name for item in value] if named else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
