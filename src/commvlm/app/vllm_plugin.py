"""What vLLM calls under the entry point `vllm.general_plugins`, in every process that it starts.

vLLM serves models of transformers that it has no code for through its own "Transformers modeling backend", which asks for
what this model has: attention by the library's interface, `get_encoder(modality="image")`,
`get_image_features(...).pooler_output`, and a processor with `image_token`, `replace_image_token` and
`_get_num_multimodal_tokens`. So it is enough that the Auto classes know the model; nothing of vLLM is imported here.
"""

from __future__ import annotations


def register() -> None:
    """Makes transformers' Auto classes know the model. Calling it again changes nothing."""
    from ..model import register as register_model

    register_model()
