"""The language model in 8 or 4 bits through bitsandbytes, where that is installed; one line where it is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from test_answering import checkpoint, examples, images  # noqa: F401

from commvlm.app import checkpoint as loading
from commvlm.app.answering import Answerer


def test_without_bitsandbytes_it_is_one_line(checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^8-bit weights need bitsandbytes: pip install 'commvlm\[quantize\]'$"):
        Answerer(checkpoint, bits=8)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra quantize")
@pytest.mark.parametrize(("bits", "least"), [(8, 0.99), (4, 0.9)])
def test_the_language_model_alone_is_smaller_and_says_nearly_the_same(checkpoint: Path, examples, bits, least):  # noqa: F811
    whole, small = Answerer(checkpoint, device="cpu"), Answerer(checkpoint, device="cpu", bits=bits)
    kinds = {type(m).__name__ for m in small.model.model.language_model.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {"Linear8bitLt" if bits == 8 else "Linear4bit"}
    for part in ("encoders", "merge", "align", "project"):
        names = {type(m).__name__ for m in small.model.parts()[part].modules()}
        assert not names & {"Linear8bitLt", "Linear4bit"}
    sizes = [sum(p.nbytes for p in a.model.model.language_model.layers.parameters()) for a in (small, whole)]
    assert sizes[0] < sizes[1] * bits / 32 * 1.2
    batch = whole.collator.prompt_batch(examples[:2])
    with torch.inference_mode():
        near, true = (a.model(**batch).logits[:, -1] for a in (small, whole))
    assert torch.cosine_similarity(near, true, dim=-1).min() > least
    assert len(small(examples)) == len(examples)
