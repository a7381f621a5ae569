"""Configs of the transformers citizen: the visual branches, and the whole model. Every check of a setting is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .encoders import check_final_norm, family_of, grid
from .layers import parse_layers
from .merge import ALIGNS, FUSES, MERGES, PROJECTS
from .names import choice, nearest, settle

BRANCH_FIELDS = ("name", "depth", "layers", "merge", "align", "image_size", "mean", "std", "final_norm")
GEOMETRIES = ("pad-square", "stretch", "center-crop")


class CommVisionConfig(PreTrainedConfig):
    """Several encoders, several layers each.

    branches: one dict per encoder, in the order of pixel_values and of the concatenation, with the fields
      name: of the encoder; its library config is the attribute of that name, cut after the deepest asked layer.
      depth: blocks of the whole encoder. layers: the asked ones, ascending, 1-based.
      merge, align: {"kind": ..., options}, rows of `merge.MERGES` and `merge.ALIGNS`.
      image_size: side in pixels of the square image that it gets. mean, std: of RGB in [0, 1].
      final_norm: "before" or "after", for its last block.
    fuse: a row of `merge.FUSES`.
    hidden_size: width of the fused tokens; derived.
    Raises ValueError (one line) for settings that do not fit together, such as unequal grids.
    """

    model_type = "comm_vision"
    base_config_key = "vision_config"

    branches: list[dict[str, Any]] | None = None
    fuse: dict[str, Any] | str = "channel-concat"
    hidden_size: int = 0

    def __post_init__(self, **kwargs: Any):
        self.branches = [dict(branch) for branch in self.branches or []]
        for branch in self.branches:
            name = _encoder_name(branch)
            if name in self.__dict__:
                raise ValueError(f"two encoders are called {name!r}; give each its own name")
            setattr(self, name, _encoder_config(name, kwargs.pop(name, None)))
        super().__post_init__(**kwargs)
        self.fuse = settle(self.fuse, FUSES, what="fuse")
        self.branches = [_settle_branch(branch, self.encoder_config(branch["name"])) for branch in self.branches]
        _check_grids(self)
        self.hidden_size = sum(self.encoder_config(name).hidden_size for name in self.names)  # type: ignore[attr-defined]

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
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens."""
        return self.grid_of(self.names[0])

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image."""
        rows, columns = self.grid
        return rows * columns

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
    name = branch["name"]
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
    blocks: int = config.num_hidden_layers  # type: ignore[attr-defined]
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


def _check_grids(config: CommVisionConfig) -> None:
    """Raises ValueError when two encoders' grids differ: channels can only be concatenated token by token."""
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
            f"{config.fuse['kind']} needs equal ones; set image_size of {name!r} to {fit}"  # type: ignore[index]
        )


class CommConfig(PreTrainedConfig):
    """COMM: visual branches, a projection, a language model.

    project: a row of `merge.PROJECTS`. image_token_id: of the placeholder that visual tokens are written over.
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
    image_token_id: int = 32000
    geometry: str = "pad-square"
    pad_color: list[int] | tuple[int, ...] = (255, 255, 255)
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        self.project = settle(self.project, PROJECTS, what="project")
        choice(self.geometry, of=GEOMETRIES, what="geometry")
        self.pad_color = [int(value) for value in self.pad_color]
        self.tie_word_embeddings = self.text_config.tie_word_embeddings  # type: ignore[union-attr]
        _check_head(self.text_config)  # type: ignore[arg-type]

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one image: how often its placeholder is repeated."""
        return self.vision_config.num_image_tokens  # type: ignore[union-attr]


def _check_head(text: PreTrainedConfig) -> None:
    """Raises ValueError for language models that scale or cap their logits: here a head is one Linear."""
    settings = text.to_dict()
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        if settings.get(name, neutral) not in (neutral, None):
            raise ValueError(
                f"language model {text.model_type!r} has {name}={settings[name]}, which is not supported; "
                "take one with a plain head, such as Llama or Qwen3"
            )
