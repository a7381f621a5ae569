"""Instructions: every task has variants that carry its content once; the first is fixed; training's choice is seeded."""

from pathlib import Path

import numpy as np
import pytest

from commvlm.data.example import BOXES, IMAGE, Example, Turn
from commvlm.data.prompts import PROMPTS
from commvlm.data.templates import CONTENT, SETS, TEMPLATES, instruct, variants

WITHOUT_CONTENT = ("caption", "spotting")


@pytest.mark.parametrize("prompts", SETS)
@pytest.mark.parametrize("task", PROMPTS)
def test_variants_carry_their_content_once(task, prompts):
    known = variants(task, prompts)
    assert len(set(known)) == len(known)
    for variant in known:
        assert variant.count(CONTENT) == (0 if task in WITHOUT_CONTENT else 1), variant
        assert variant.count("{") == variant.count(CONTENT)
        assert not any(slot in variant for slot in (IMAGE, BOXES))


def test_both_sets_begin_alike_and_wide_ones_are_wide():
    assert set(TEMPLATES) <= set(PROMPTS)
    for task, short in TEMPLATES.items():
        assert PROMPTS[task][0] == short[0]
        assert len(PROMPTS[task]) > len(short)
    assert all(len(PROMPTS[task]) >= 8 for task in ("rec", "reg", "gc", "vqa", "caption", "spotting", "cot"))


def example(task="vqa", question="What {} is {content}?"):
    return Example("e", task, Path("a.png"), (Turn(question, "x"),))


def test_braces_in_a_users_text_are_text():
    assert instruct(example()).turns[0].question == "<image>\nWhat {} is {content}? Answer in one word."
    seen = {instruct(example(), np.random.default_rng(n), prompts="wide").turns[0].question for n in range(300)}
    assert len(seen) == len(PROMPTS["vqa"])
    assert all("What {} is {content}?" in question for question in seen)


def test_the_choice_is_seeded_and_evaluations_is_fixed():
    drawn = [[instruct(example(), np.random.default_rng(seed), prompts="wide") for seed in range(20)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({e.turns[0].question for e in drawn[0]}) > 3
    assert {instruct(example(), prompts=prompts).turns[0].question for prompts in SETS} == {
        "<image>\nWhat {} is {content}? Answer in one word."
    }


def test_mme_is_asked_as_its_file_asks():
    asked = "Is this movie titled x?  Please answer yes or no."
    assert instruct(example("mme", asked)).turns[0].question == f"<image>\n{asked}"
    with pytest.raises(KeyError):
        instruct(example("poetry"))
