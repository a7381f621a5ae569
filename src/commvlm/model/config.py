"""Configs of the transformers citizen: the visual branches, and the whole model. Every check of a setting is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .align import ALIGNS, PROJECTS
from .branches import make_branches, make_fuse, make_reduce, without_kind
from .encoders import check_final_norm
from .families import family_of, grid
from .fuse import FUSES, REDUCES
from .layers import parse_layers
from .merges import MERGES
from .names import choice, nearest, settle
from .tokens import Grid, Tokens

BRANCH_FIELDS = ("name", "depth", "layers", "merge", "align", "image_size", "mean", "std", "final_norm")
GEOMETRIES = ("pad-square", "stretch", "center-crop")
FRAMES = ("none", "learned")


class CommVisionConfig(PreTrainedConfig):
    """Several encoders, several layers each.

    branches: one dict per encoder, in the order of pixel_values and of the fuse, with the fields
      name: of the encoder; its library config is the attribute of that name, cut after the deepest asked layer.
      depth: blocks of the whole encoder. layers: the asked ones, ascending, 1-based.
      merge, align: {"kind": ..., options}, rows of `merges.MERGES` and `align.ALIGNS`.
      image_size: side in pixels of the square image that it gets. mean, std: of RGB in [0, 1].
      final_norm: "before" or "after", for its last block.
    fuse: a row of `fuse.FUSES`; its option "grid" names the grid that branches of different grids are resampled to: an
    encoder's name, a side, or [rows, columns]. reduce: a row of `fuse.REDUCES`.
    hidden_size, num_image_tokens: width and number of an image's visual tokens; derived.
    Raises ValueError (one line) for settings that do not fit together, such as unequal grids.
    """

    model_type = "comm_vision"
    base_config_key = "vision_config"

    branches: list[dict[str, Any]] | None = None
    fuse: dict[str, Any] | str = "channel-concat"
    reduce: dict[str, Any] | str = "none"
    hidden_size: int = 0
    num_image_tokens: int = 0

    def __post_init__(self, **kwargs: Any):
        self.branches = [dict(branch) for branch in self.branches or []]
        for branch in self.branches:
            name = _encoder_name(branch)
            if name in self.__dict__:
                raise ValueError(f"two encoders are called {name!r}; give each its own name")
            setattr(self, name, _encoder_config(name, kwargs.pop(name, None)))
        super().__post_init__(**kwargs)
        self.fuse = _settle_fuse(self.fuse)
        self.reduce = settle(self.reduce, REDUCES, what="reduce")
        self.branches = [_settle_branch(branch, self.encoder_config(branch["name"])) for branch in self.branches]
        if self.branches:
            tokens = self.image_tokens()
            self.hidden_size, self.num_image_tokens = tokens.dim, tokens.count

    def image_tokens(self) -> Tokens:
        """Number, width and grid of an image's visual tokens. The modules themselves say so, made without memory."""
        with torch.device("meta"):
            return make_reduce(self.reduce, make_fuse(self.fuse, self.make_branches()).out).out  # type: ignore[return-value,arg-type]

    def make_branches(self) -> list[Any]:
        """The branches, with fresh weights."""
        common = common_grid(self)
        dims = [family_of(self.encoder_config(name)).width(self.encoder_config(name)) for name in self.names]
        grids = [self.grid_of(name) for name in self.names]
        if common is None and self.fuse["kind"] != "token-concat":  # type: ignore[index]
            _check_grids(self)
        return make_branches(self.branches or [], dims, grids, common=common)

    @property
    def sub_configs(self) -> dict[str, Any]:  # type: ignore[override]
        """What the library walks to pass on dtype and attention implementation: one named attribute per encoder."""
        return dict.fromkeys(self.names, AutoConfig)

    @property
    def names(self) -> list[str]:
        """The encoders' names, in order."""
        return [branch["name"] for branch in self.__dict__.get("branches") or []]

    def encoder_config(self, name: str) -> PreTrainedConfig:
        """The library's config of one encoder, as deep as its deepest asked layer."""
        return self.__dict__[name]

    def grid_of(self, name: str) -> tuple[int, int]:
        """Rows and columns of one encoder's patch tokens."""
        branch = next(branch for branch in self.branches or [] if branch["name"] == name)
        return grid(self.encoder_config(name), branch["image_size"], name=name)

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of the visual tokens; None where they are no one grid."""
        return self.image_tokens().grid

    @property
    def image_sizes(self) -> list[int]:
        """Side in pixels of each encoder's image, in order."""
        return [branch["image_size"] for branch in self.branches or []]

    @property
    def pixels_per_image(self) -> int:
        """P, the length of a row of pixel_values."""
        return sum(3 * size * size for size in self.image_sizes)


def _encoder_name(branch: Mapping[str, Any]) -> str:
    unknown = [name for name in branch if name not in BRANCH_FIELDS]
    if unknown:
        raise ValueError(f"a branch has no field {unknown[0]!r}; {nearest(unknown[0], list(BRANCH_FIELDS))}")
    lacking = [name for name in ("name", "layers", "image_size") if name not in branch]
    if lacking:
        raise ValueError(f"branch {dict(branch)!r} has no {lacking[0]!r}")
    return check_encoder_name(branch["name"])


def check_encoder_name(name: object) -> str:
    """The name. Raises ValueError where it is none that a branch can have."""
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_") or hasattr(CommVisionConfig, name):
        raise ValueError(f"encoder name {name!r} cannot be used; take letters, digits and _, such as 'clip'")
    return name


def _encoder_config(name: str, given: PreTrainedConfig | Mapping[str, Any] | None) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        config = given
    elif isinstance(given, Mapping) and given.get("model_type") in CONFIG_MAPPING:
        config = CONFIG_MAPPING[given["model_type"]](**{k: v for k, v in given.items() if k != "model_type"})
    else:
        raise ValueError(f"branch {name!r} needs the config of its encoder under the same name, got {given!r}")
    family_of(config)
    return config


def _settle_branch(branch: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """A branch with every default filled in and every field checked."""
    name = branch["name"]
    blocks = family_of(config).depth(config)
    layers = parse_layers(branch["layers"], blocks)
    depth = branch.get("depth", blocks)
    if layers[-1] != blocks or depth < blocks:
        raise ValueError(
            f"encoder {name!r} has {blocks} of {depth} blocks, but its deepest asked layer is {layers[-1]}"
        )
    final_norm = branch.get("final_norm", "before")
    check_final_norm(config, final_norm, name=name, deepest=layers[-1], depth=depth)
    family = family_of(config)
    return {
        "name": name,
        "depth": depth,
        "layers": list(layers),
        "merge": settle(branch.get("merge", "mean"), MERGES, what="merge"),
        "align": settle(branch.get("align", "identity"), ALIGNS, what="align"),
        "image_size": branch["image_size"],
        "mean": list(branch.get("mean") or family.mean),
        "std": list(branch.get("std") or family.std),
        "final_norm": final_norm,
    }


def _settle_fuse(fuse: Mapping[str, Any] | str) -> dict[str, Any]:
    """The fuse in full, its common grid among its options."""
    given = {"kind": fuse} if isinstance(fuse, str) else dict(fuse)
    common = given.pop("grid", None)
    return {**settle(given, FUSES, what="fuse"), "grid": common}


def common_grid(config: CommVisionConfig) -> Grid | None:
    """The grid that the fuse names, None where it names none. Raises ValueError for what is no grid."""
    said = config.fuse["grid"]  # type: ignore[index]
    if said is None:
        return None
    if isinstance(said, str):
        if said not in config.names:
            raise ValueError(f"fuse has grid {said!r}, which is no encoder; {nearest(said, config.names)}")
        return config.grid_of(said)
    sides = [said, said] if isinstance(said, int) else list(said) if isinstance(said, list | tuple) else []
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"fuse has grid {said!r}; give an encoder's name, a side such as 24, or [rows, columns]")
    return sides[0], sides[1]


def _check_grids(config: CommVisionConfig) -> None:
    """Raises ValueError, with the ways out, when two encoders' grids differ."""
    grids = {name: config.grid_of(name) for name in config.names}
    for name in config.names[1:]:
        first = config.names[0]
        if grids[name] == grids[first]:
            continue
        sizes = dict(zip(config.names, config.image_sizes, strict=True))
        fit = sizes[name] // grids[name][0] * grids[first][0]
        raise ValueError(
            f"the grids of encoders {first!r} ({grids[first][0]} x {grids[first][1]}, image_size {sizes[first]}) and "
            f"{name!r} ({grids[name][0]} x {grids[name][1]}, image_size {sizes[name]}) differ: "
            f"{config.fuse['kind']} needs equal ones; set image_size of {name!r} to {fit}, "  # type: ignore[index]
            f"or name the grid that all are resampled to (fuse: {{kind: {config.fuse['kind']}, grid: {first}}}), "  # type: ignore[index]
            "or fuse by token-concat"
        )


class CommConfig(PreTrainedConfig):
    """COMM: visual branches, a projection, a language model.

    project: a row of `align.PROJECTS`. frame: "learned" puts an embedding before and one after an image's tokens, as the
    <im_start> and <im_end> of LLaVA-1 and Shikra do; "none" does not. image_token_id: of the placeholder that visual tokens
    are written over.
    geometry, pad_color: how the processor makes an image square. lm_head_bias: whether the head has one.
    """

    model_type = "comm"
    sub_configs_defaults = {  # noqa: RUF012
        "vision_config": SubConfigSpec(config_class=CommVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    project: dict[str, Any] | str = "linear"
    frame: str = "none"
    image_token_id: int = 32000
    geometry: str = "pad-square"
    pad_color: list[int] | tuple[int, ...] = (255, 255, 255)
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        self.project = settle(self.project, PROJECTS, what="project")
        if not isinstance(self.image_token_id, int):
            raise ValueError(f"image_token_id is {self.image_token_id!r}, it must be an id")
        choice(self.frame, of=FRAMES, what="frame")
        choice(self.geometry, of=GEOMETRIES, what="geometry")
        colors = list(self.pad_color) if isinstance(self.pad_color, list | tuple) else []
        if len(colors) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colors):
            raise ValueError(f"pad_color is {self.pad_color!r}, it must be red, green and blue from 0 to 255")
        self.pad_color = [int(value) for value in colors]
        self.tie_word_embeddings = self.text_config.tie_word_embeddings  # type: ignore[union-attr]
        _check_head(self.text_config)  # type: ignore[arg-type]
        if self.vision_config.branches:  # type: ignore[union-attr]
            with torch.device("meta"):
                self.make_project()

    def make_project(self) -> Any:
        """The projection, with fresh weights. Raises ValueError where it cannot lead from one width to the other."""
        spec: dict[str, Any] = self.project  # type: ignore[assignment]
        width, to = self.vision_config.hidden_size, self.text_config.hidden_size  # type: ignore[union-attr]
        try:
            return PROJECTS[spec["kind"]](width, to, **without_kind(spec))
        except (ValueError, TypeError) as error:
            raise ValueError(f"project {spec['kind']!r}: {error}") from error

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image, its frame's included: how often its placeholder is repeated."""
        return self.vision_config.num_image_tokens + (2 if self.frame == "learned" else 0)  # type: ignore[union-attr]


def _check_head(text: PreTrainedConfig) -> None:
    """Raises ValueError for language models that scale or cap their logits: here a head is one Linear."""
    settings = text.to_dict()
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        if settings.get(name, neutral) not in (neutral, None):
            raise ValueError(
                f"language model {text.model_type!r} has {name}={settings[name]}, which is not supported; "
                "take one with a plain head, such as Llama or Qwen3"
            )
