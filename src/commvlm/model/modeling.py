"""COMM as a transformers model: visual tokens written over the image placeholders of a causal language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from .attention import FLEX, NAME, Piece, Segments, block_mask, dense_mask, pieces
from .config import CommConfig
from .knock_out import KnockOut
from .loss import supervised_loss
from .vision import CommVisionModel, initialise

PARTS = ("encoders", "merge", "align", "project", "language_model")
"""What a recipe trains or freezes. The projection's part has the weights of the fuse and of the frame, if there are any."""


@dataclass
class CommModelOutput(BaseModelOutputWithPast):
    """image_hidden_states: (images * N, hidden), the visual tokens as the language model read them."""

    image_hidden_states: Tensor | None = None


@dataclass
class CommCausalLMOutput(CausalLMOutputWithPast):
    """image_hidden_states: (images * N, hidden), the visual tokens as the language model read them."""

    image_hidden_states: Tensor | None = None


class ImageFrame(nn.Module):
    """An embedding before and one after an image's tokens: (b, n, d) -> (b, n + 2, d)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        start, end = (row.expand(tokens.shape[0], 1, -1) for row in self.weight)
        return torch.cat([start, tokens, end], dim=1)


class CommPreTrainedModel(PreTrainedModel):
    config_class = CommConfig
    config: CommConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def save_pretrained(
        self, save_directory: Any, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> Any:
        """As in the library, but weights are saved under this model's own names.

        The library's default renames those of some encoders (DINOv2's attention among them); its Trainer then resumes
        from such a file with only a warning for every key that it did not find.
        """
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class CommModel(CommPreTrainedModel):
    """Visual branches, projection and language model, without the head."""

    def __init__(self, config: CommConfig):
        super().__init__(config)
        self.vision_tower = CommVisionModel(config.vision_config)  # type: ignore[arg-type]
        self.multi_modal_projector = config.make_project()
        width: int = config.text_config.hidden_size  # type: ignore[union-attr]
        self.image_frame = ImageFrame(width) if config.frame == "learned" else nn.Identity()
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, knock_out: KnockOut | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """(images, P) -> last_hidden_state (images, N, fused width), pooler_output [image](N, hidden).

        knock_out: encoders and layers that are switched off; see `CommVisionModel.forward`.
        """
        fused = self.vision_tower(pixel_values, knock_out=knock_out).last_hidden_state
        tokens = self.image_frame(self.multi_modal_projector(fused))
        return BaseModelOutputWithPooling(last_hidden_state=fused, pooler_output=list(tokens))  # type: ignore[arg-type]

    def write_images(self, embeds: Tensor, input_ids: Tensor | None, features: Tensor) -> Tensor:
        """embeds (b, n, hidden) with features (images * N, hidden) over the image placeholders, in order.

        input_ids: (b, n), or None when only embeddings were given; placeholders are then told by their embedding.
        Raises ValueError, with both numbers, when there are more or fewer placeholders than features.
        """
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=embeds.device)
            slots = (embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            slots = input_ids == self.config.image_token_id
        found, needed = int(slots.sum()), features.shape[0]
        if found != needed:
            per_image = self.config.num_image_tokens
            raise ValueError(
                f"the prompts hold {found} image placeholders, but {needed // per_image} images give {needed} visual "
                f"tokens; repeat the image token {per_image} times per image, as the processor does"
            )
        return embeds.masked_scatter(slots.unsqueeze(-1).to(embeds.device), features.to(embeds.device, embeds.dtype))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        knock_out: KnockOut | None = None,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> CommModelOutput:
        """input_ids (b, n), pixel_values (images, P), attention_mask (b, n) or (b, 1, n, n) bool, True: may look there.

        segments: of a packed row (b = 1), in place of a mask; see `attention`. mm_encoder_outputs: {"image": what
        get_image_features gave}, in place of pixel_values. knock_out: encoders and layers
        that are switched off in pixel_values' reading; see `CommVisionModel.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        images = (mm_encoder_outputs or {}).get("image")
        if images is not None and pixel_values is not None:
            raise ValueError("give pixel_values or mm_encoder_outputs, not both")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None:
            images = self.get_image_features(pixel_values, knock_out=knock_out, return_dict=True)
        features = None
        if images is not None:
            features = torch.cat(list(images.pooler_output))  # type: ignore[arg-type]
            embeds = self.write_images(embeds, input_ids, features)
        if segments is not None:
            attention_mask, kwargs["pieces"] = self._packed(segments, embeds)
        if (
            self.training and past_key_values is None
        ):  # a cache that nobody reads would copy every layer's keys and values
            kwargs.setdefault("use_cache", False)
        output = self.language_model(
            attention_mask=self._additive(attention_mask, embeds),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            **kwargs,
        )
        return CommModelOutput(
            last_hidden_state=output.last_hidden_state,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_hidden_states=features,
        )

    def _packed(self, segments: Segments, embeds: Tensor) -> tuple[Any, list[Piece] | None]:
        """A packed row's mask and pieces, whichever the language model's attention reads."""
        if embeds.shape[:2] != (1, total := sum(map(sum, segments))):
            raise ValueError(f"segments are of one row of {total} tokens, the batch is {tuple(embeds.shape[:2])}")
        attention = self.language_model.config._attn_implementation
        if attention == NAME:
            return None, pieces(segments, embeds.device, computed_in(embeds))
        return (block_mask if attention == FLEX else dense_mask)(segments, embeds.device), None

    def _additive(self, mask: Any, embeds: Tensor) -> Any:
        """A (b, 1, n, n) boolean mask as the summand of scores that eager and SDPA take; others as they are."""
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.dtype != torch.bool:
            return mask
        attention = self.language_model.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"a (b, 1, n, n) mask needs attention 'sdpa' or 'eager', not {attention!r}")
        dtype = computed_in(embeds)
        # Finite, so that an empty row is no NaN.
        blocked = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=mask.device)
        return torch.where(mask, torch.zeros_like(blocked), blocked)


def computed_in(embeds: Tensor) -> torch.dtype:
    """The dtype of queries, and so of what is added to their scores: autocast's, where there is autocast."""
    device = embeds.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeds.dtype


class CommForConditionalGeneration(CommPreTrainedModel, GenerationMixin):
    """COMM with its language model's head: `forward` for training, `generate` for answers."""

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: CommConfig):
        super().__init__(config)
        self.model = CommModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self._tied_weights_keys = {"lm_head.weight": self._embedding_name()}
        self.post_init()

    def _embedding_name(self) -> str:
        """The input embedding's full name; language models of different families call it differently."""
        embedding = self.model.get_input_embeddings()
        return next(f"{name}.weight" for name, module in self.named_modules() if module is embedding)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(
        self, pixel_values: Tensor, knock_out: KnockOut | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """(images, P) -> last_hidden_state (images, N, fused width), pooler_output [image](N, hidden).

        knock_out: encoders and layers that are switched off; see `CommVisionModel.forward`.
        """
        return self.model.get_image_features(pixel_values, knock_out=knock_out, **kwargs)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that a recipe trains or freezes, every parameter in exactly one (tied ones once): see `PARTS`."""
        vision = self.model.vision_tower
        branches = list(vision.branches.values())
        return {
            "encoders": nn.ModuleList(vision.encoder(name) for name in vision.config.names),
            "merge": nn.ModuleList(branch.merge for branch in branches),  # type: ignore[union-attr]
            "align": nn.ModuleList(branch.align for branch in branches),  # type: ignore[union-attr]
            "project": nn.ModuleList([vision.fuse, self.model.multi_modal_projector, self.model.image_frame]),
            "language_model": nn.ModuleList([self.model.language_model, self.lm_head]),
        }

    def layer_weights(self) -> dict[str, dict[int, float]]:
        """Each encoder's layer weights as they are now: name -> {layer number: weight}."""
        return self.model.vision_tower.layer_weights()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        knock_out: KnockOut | None = None,
        **kwargs: Any,
    ) -> CommCausalLMOutput:
        """As `CommModel.forward`; labels (b, n), -100 where not supervised, are shifted here.

        The loss is the mean over supervised tokens, or their sum / num_items_in_batch when that is given; it is computed from
        the logits of the supervised positions alone (see `loss`). skip_logits: whether `logits` is None in the output; by
        default so in training with labels, where nobody reads (b, n, vocabulary) numbers.
        logits_to_keep: only the last so many positions (or those at these indices) get logits (b, kept, vocabulary).
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            knock_out=knock_out,
            **kwargs,
        )
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        logits = None
        if not skip_logits:
            logits = self.lm_head(slice_logits_to_keep(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            number = kwargs.get("num_items_in_batch")
            vocabulary: int = self.config.text_config.vocab_size  # type: ignore[union-attr]
            loss = supervised_loss(self.lm_head, output.last_hidden_state, labels, vocabulary=vocabulary, number=number)
        return CommCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_hidden_states=output.image_hidden_states,
        )
