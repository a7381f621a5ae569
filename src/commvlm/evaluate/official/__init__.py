"""Anybody's predictions in the official file formats, scored offline: one small file a benchmark.

Each reads its files into the records that all scoring here works on, and scores them with nothing taken off the answers,
as the official code does. What it returns holds the official code's own figures in the official code's own units.
"""

from .caption import score_caption
from .mme import score_mme
from .pope import score_pope
from .refer import score_rec, score_reg
from .result import Official
from .vqa import score_vqa
from .write import write_official

__all__ = [
    "Official",
    "score_caption",
    "score_mme",
    "score_pope",
    "score_rec",
    "score_reg",
    "score_vqa",
    "write_official",
]
