"""Encoders, merges, visual branches, and the transformers citizen built of them."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .build import add_image_token, build_model, build_processor
from .checkpoints import CheckpointError, find_checkpoint
from .config import CommConfig, CommVisionConfig
from .modeling import PARTS, CommForConditionalGeneration, CommModel
from .processing import CommImageProcessor, CommProcessor, ImageError, open_image
from .spec import EncoderSpec, build_config
from .vision import CommVisionModel

__all__ = [
    "PARTS",
    "CheckpointError",
    "CommConfig",
    "CommForConditionalGeneration",
    "CommImageProcessor",
    "CommModel",
    "CommProcessor",
    "CommVisionConfig",
    "CommVisionModel",
    "EncoderSpec",
    "ImageError",
    "add_image_token",
    "build_config",
    "build_model",
    "build_processor",
    "find_checkpoint",
    "open_image",
    "register",
]


def register() -> None:
    """Make the library's Auto classes know this model. Calling it again changes nothing."""
    AutoConfig.register(CommVisionConfig.model_type, CommVisionConfig, exist_ok=True)
    AutoConfig.register(CommConfig.model_type, CommConfig, exist_ok=True)
    AutoModel.register(CommVisionConfig, CommVisionModel, exist_ok=True)
    AutoModel.register(CommConfig, CommModel, exist_ok=True)
    AutoModelForImageTextToText.register(CommConfig, CommForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(CommConfig, image_processor_classes={"pil": CommImageProcessor}, exist_ok=True)
    AutoProcessor.register(CommConfig, CommProcessor, exist_ok=True)


register()
