"""The field's metrics as pure functions: texts and numbers in, numbers out; each names the official code it follows."""

from .bootstrap import Interval, bootstrap
from .cider import Cider, cider_d
from .pope import PopeScores, pope_answer, pope_scores, says_yes_or_no
from .rec import REC_RULES, rec_correct
from .tokenizers import TOKENIZERS, approximate_tokenize, ptb_tokenize
from .vqa import VQA_RULES, normalise_answer, vqa_accuracy

__all__ = [
    "REC_RULES",
    "TOKENIZERS",
    "VQA_RULES",
    "Cider",
    "Interval",
    "PopeScores",
    "approximate_tokenize",
    "bootstrap",
    "cider_d",
    "normalise_answer",
    "pope_answer",
    "pope_scores",
    "ptb_tokenize",
    "rec_correct",
    "says_yes_or_no",
    "vqa_accuracy",
]
