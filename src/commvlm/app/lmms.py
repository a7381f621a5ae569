"""What lmms-eval finds under the entry point `lmms_eval.models`: `lmms-eval --model commvlm --model_args pretrained=DIR`.

Nothing of lmms-eval is needed until it asks. It is no dependency: its own pins would change the libraries that this package
stands on, so it lives in an environment of its own with this package beside it.
"""

from __future__ import annotations

from typing import Any

MODEL = "commvlm"


def manifest() -> Any:
    """The registry's payload: the name, and the class that answers (see `lmms_model`)."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id=MODEL, chat_class_path="commvlm.app.lmms_model.CommVLM")
