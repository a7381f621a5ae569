"""What a task is: how an example is asked, how an answer is read, how the readings are scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from commvlm.data.example import Box, Example
from commvlm.data.templates import instruct

from ..metrics import Interval

Size = tuple[int, int]
"""Width and height of the original image, in pixels."""
LARGEST = 1_000_000_000
"""Pixels: every side, and every corner of a true box or of one in pixels, is below it."""
Parsed = str | Box | None
"""What an answer says: a text, or a box in pixels of the original image; None where it says nothing of the kind."""
Facts = Mapping[str, str | int | float]
NO_FACTS: Facts = {}

_YES_OR_NO = re.compile(r"(yes|no)\b", re.IGNORECASE)
_WRAPPER = re.compile(r"\b(?:so )?the answer is\b:?|^[^\S\n]*answer:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Record:
    """One line of predictions.jsonl: all that scoring and reports need, without the examples' files.

    question: as it was asked, with its slots. text: the answer as the model gave it. parsed: what the task's parse read
    in it. answer, boxes: the true answer with its slots, and the boxes in them. asked_boxes: those of the question.
    All boxes are in pixels of the original image.
    """

    id: str
    task: str
    image: str | None
    width: int | None
    height: int | None
    question: str
    text: str
    parsed: Parsed
    answer: str
    boxes: tuple[Box, ...] = ()
    asked_boxes: tuple[Box, ...] = ()
    references: tuple[str, ...] = ()
    facts: Facts = field(default_factory=dict)

    @property
    def cluster(self) -> str:
        """What standard errors resample: the image, or the record itself where there is none."""
        return f"id {self.id}" if self.image is None else self.image

    @property
    def name(self) -> str:
        return f"{self.task} {self.id}"


@dataclass(frozen=True)
class Score:
    """One task's figures. value is in percent (CIDEr times 100, as papers print it; MME in points); so are its standard
    error and 95 % interval, from a bootstrap clustered by image (None with fewer than two images).

    unparsable answers are part of n. rule names the official or house rule that was applied. marks: what each scored
    item earned, by the id of its (first) record, in [0, 1] (CIDEr: 0 to 10). readings: the same for figures of `extra` that
    are means of marks, too. Neither is part of a file of scores.
    """

    task: str
    metric: str
    rule: str
    value: float
    standard_error: float | None
    interval: tuple[float, float] | None
    n: int
    unparsable: int
    extra: Mapping[str, object] = field(default_factory=dict)
    marks: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    readings: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False, compare=False)

    def as_json(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if name not in ("marks", "readings")}


Scorer = Callable[[Sequence[Record]], Score]


def as_it_is(text: str) -> str:
    return text


@dataclass(frozen=True)
class Task:
    """name: that of the examples' task. rules: each rule's scorer, the default one first.

    parse: an answer's text, the image's size and the record's facts -> what it says, None when it cannot be read.
    bare: what is taken off every answer before it is scored; how many answers that changed is in the score.
    wrapped: rules that read the answer with its wrapper on. whole: whether its figure is over all of its sources together.
    """

    name: str
    parse: Callable[[str, Size | None, Facts], Parsed]
    rules: Mapping[str, Scorer]
    instruct: Callable[[Example], Example] = instruct
    bare: Callable[[str], str] = as_it_is
    wrapped: tuple[str, ...] = ()
    whole: bool = False

    def rule_named(self, rule: str | None) -> str:
        """The rule itself, the default one for None. Raises ValueError for one that the task has not."""
        chosen = next(iter(self.rules)) if rule is None else rule
        if chosen not in self.rules:
            raise ValueError(f"{self.name} has no rule {chosen!r}: choose one of {', '.join(self.rules)}")
        return chosen

    def score(
        self, records: Sequence[Record], *, rule: str | None = None, bare: Callable[[str], str] | None = None
    ) -> Score:
        """bare: in place of the task's own, `as_it_is` for the official code's figures on answers as they were given.

        Raises ValueError for an unknown rule, for no records, and for a record that lacks its truth (named).
        """
        chosen = self.rule_named(rule)
        if not records:
            raise ValueError(f"{self.name} has nothing to score: no predictions were given")
        strip = self.bare if bare is None else bare
        if strip is as_it_is or chosen in self.wrapped:
            return self.rules[chosen](records)
        stripped = [replace(record, text=strip(record.text)) for record in records]
        score = self.rules[chosen](stripped)
        changed = sum(new.text != old.text for new, old in zip(stripped, records, strict=True))
        return replace(score, extra={**score.extra, "unwrapped": changed})


def unwrap(text: str) -> str:
    """The bare answer: "The answer is X.", "... So the answer is X." and "Answer: X" -> X; other texts untouched.

    As Shikra has it, the wrapper counts only where it stands exactly once; then one closing full stop goes too.
    """
    found = list(_WRAPPER.finditer(text))
    if len(found) != 1:
        return text
    rest = text[found[0].end() :].strip().splitlines()
    return rest[0].strip().removesuffix(".").rstrip() if rest else ""


def unwrap_yes_or_no(text: str) -> str:
    """`unwrap` where what is left begins with yes or no; other texts untouched, such as "Yes, the answer is 225."."""
    bare = unwrap(text)
    return bare if _YES_OR_NO.match(bare) else text


def percent(share: float) -> float:
    return 100.0 * share


def interval_in_percent(interval: Interval | None) -> tuple[float | None, tuple[float, float] | None]:
    """A bootstrap's outcome in shares -> (standard error, (low, high)) in percent, as Score holds them.

    Rounded to what the draws can tell at most, so that the order of a matrix product's sums does not show.
    """
    if interval is None:
        return None, None
    error, low, high = (round(percent(figure), 6) for figure in interval)
    return error, (low, high)
