"""BLEU and ROUGE-L by the official code itself, pycocoevalcap, on tokenised captions."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec


def bleu_and_rouge(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Tokenised captions -> bleu1 to bleu4 and rouge_l over the corpus, shares in [0, 1].

    An image whose hypothesis is empty counts as one without matches; pycocoevalcap would stop at it.
    Raises ValueError when the extra is missing.
    """
    if find_spec("pycocoevalcap") is None:
        raise ValueError("BLEU and ROUGE-L need pycocoevalcap, install it with: pip install 'commvlm[caption]'")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    truths = {k: list(sentences) for k, sentences in enumerate(references)}
    said = {k: [text or _NOTHING] for k, text in enumerate(hypotheses)}
    bleu, _ = Bleu(4).compute_score(truths, said, verbose=0)
    rouge, _ = Rouge().compute_score(truths, said)
    return {**{f"bleu{n}": float(value) for n, value in enumerate(bleu, start=1)}, "rouge_l": float(rouge)}


_NOTHING = "\u2400"
"""A token that no caption holds."""
