"""What vLLM calls under the entry point `vllm.general_plugins`, in every process that it starts.

vLLM serves models of transformers that it has no code for through its own "Transformers modeling backend", which asks for
what this model has: attention by the library's interface, `get_encoder(modality="image")`,
`get_image_features(...).pooler_output`, and a processor with `image_token`, `replace_image_token` and
`_get_num_multimodal_tokens`. The backend looks for the class that config.json names as an attribute of `transformers`, or in
its `auto_map` (`_try_resolve_transformers` in vllm/model_executor/models/registry.py), so the Auto classes alone do not do.
Nothing of vLLM is imported here.
"""

from __future__ import annotations


def register() -> None:
    """Makes transformers' Auto classes know the model, and `transformers` have it. Calling it again changes nothing."""
    import transformers

    from ..model import CommForConditionalGeneration
    from ..model import register as register_model

    register_model()
    setattr(transformers, CommForConditionalGeneration.__name__, CommForConditionalGeneration)
