"""The field's metrics as pure functions: texts and numbers in, numbers out; each names the official code it follows."""

from .bootstrap import Interval, bootstrap
from .cider import Cider, cider_d
from .mme import COGNITION, MME_RULES, PERCEPTION, SUBTASKS, MmeScores, mme_answer, mme_scores
from .pope import POPE_RULES, PopeScores, pope_answer, pope_scores, says_yes_or_no
from .rec import REC_RULES, STRETCHED, only_box, rec_correct, rec_iou, stretched_box
from .sentences import bleu_and_rouge
from .tokenizers import TOKENIZERS, approximate_tokenize, ptb_tokenize
from .vqa import VQA_RULES, normalise_answer, vqa_accuracy

__all__ = [
    "COGNITION",
    "MME_RULES",
    "PERCEPTION",
    "POPE_RULES",
    "REC_RULES",
    "STRETCHED",
    "SUBTASKS",
    "TOKENIZERS",
    "VQA_RULES",
    "Cider",
    "Interval",
    "MmeScores",
    "PopeScores",
    "approximate_tokenize",
    "bleu_and_rouge",
    "bootstrap",
    "cider_d",
    "mme_answer",
    "mme_scores",
    "normalise_answer",
    "only_box",
    "pope_answer",
    "pope_scores",
    "ptb_tokenize",
    "rec_correct",
    "rec_iou",
    "says_yes_or_no",
    "stretched_box",
    "vqa_accuracy",
]
