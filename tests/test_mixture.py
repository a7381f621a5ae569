"""Mixtures: a pure function of (seed, index), with the shares and the groups that were asked for."""

import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from commvlm.data.example import Example, Turn
from commvlm.data.mixture import Mixture, Source
from commvlm.data.templates import TEMPLATES


def source(name, count, *, weight=1.0, images=4, task="vqa", text_only=False):
    return Source(
        name,
        [
            Example(f"{name}-{n}", task, None if text_only else Path(f"{n % images}.png"), (Turn(f"q{n}?", f"a{n}"),))
            for n in range(count)
        ],
        weight,
    )


def test_pure_in_seed_and_index():
    def made(seed=3, **kw):
        return Mixture([source("a", 40), source("b", 30, weight=2)], seed=seed, length=50, **kw)

    for group in (1, 3):
        first = [made(group=group)[index] for index in range(50)]
        mixture = made(group=group)
        order = np.random.default_rng(0).permutation(50)
        assert [first[index] for index in order] == [mixture[int(index)] for index in order]
        assert first == [pickle.loads(pickle.dumps(mixture))[index] for index in range(50)]
        assert first != [made(seed=4, group=group)[index] for index in range(50)]
        assert len({tuple(e.id for e in examples) for examples in first}) > 25
        longer = Mixture(mixture.sources, seed=3, length=500, group=group)
        assert [longer[index] for index in range(50)] == first  # the length does not enter the draw


def test_length_and_bounds():
    mixture = Mixture([source("a", 4)], seed=0, length=7)
    assert len(mixture) == 7
    assert sum(1 for _ in mixture) == 7  # iteration ends by IndexError
    for index in (7, -1):
        with pytest.raises(IndexError, match="of a mixture of 7 groups"):
            mixture[index]


def test_shares_of_independent_draws():
    mixture = Mixture(
        [source("a", 5, weight=1), source("b", 50, weight=3), source("c", 9, weight=0)], seed=1, length=8000
    )
    drawn = [mixture[index] for index in range(8000)]
    assert {len(group) for group in drawn} == {1}
    shares = Counter(group[0].id.split("-")[0] for group in drawn)
    assert shares["c"] == 0
    assert abs(shares["b"] / 8000 - 0.75) < 4 * (0.75 * 0.25 / 8000) ** 0.5
    each = Counter(group[0].id for group in drawn if group[0].id.startswith("a"))
    assert len(each) == 5
    assert all(abs(count / shares["a"] - 0.2) < 4 * (0.2 * 0.8 / shares["a"]) ** 0.5 for count in each.values())


def test_examples_come_instructed():
    mixture = Mixture([source("a", 5)], seed=1, length=300)
    seen = set()
    for index in range(300):
        (example,) = mixture[index]
        number = example.id.split("-")[1]
        question = example.turns[0].question
        assert question.startswith("<image>\n")
        seen.add(question.removeprefix("<image>\n").replace(f"q{number}?", "{content}"))
    assert seen == set(TEMPLATES["vqa"])


def test_a_group_is_about_one_image_and_does_not_repeat():
    mixture = Mixture([source("a", 40), source("b", 40, weight=5)], seed=2, length=400, group=6)
    images = Counter()
    for index in range(400):
        group = mixture[index]
        assert len(group) == 6
        assert len({example.image for example in group}) == 1
        assert len({example.id for example in group}) == 6
        images[group[0].image] += 1
    assert set(images) == {Path(f"{n}.png") for n in range(4)}
    assert all(abs(count / 400 - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5 for count in images.values())


def test_images_are_even_however_many_examples_they_have():
    many = Source("many", [Example(f"m{n}", "pope", Path("m"), (Turn("q", "yes"),)) for n in range(90)])
    few = Source("few", [Example(f"f{n}", "pope", Path("f"), (Turn("q", "yes"),)) for n in range(10)])
    mixture = Mixture([many, few], seed=0, length=1000, group=2)
    share = sum(mixture[index][0].image == Path("f") for index in range(1000)) / 1000
    assert abs(share - 0.5) < 4 * (0.25 / 1000) ** 0.5


def test_shares_within_a_group():
    mixture = Mixture([source("a", 400), source("b", 400, weight=3)], seed=5, length=1500, group=2)
    shares = Counter(example.id[0] for index in range(1500) for example in mixture[index])
    assert abs(shares["b"] / 3000 - 0.75) < 4 * (0.75 * 0.25 / 3000) ** 0.5


def test_all_are_used_before_any_comes_again():
    mixture = Mixture([source("a", 8), source("b", 4, weight=50)], seed=2, length=60, group=7)  # 3 an image
    for index in range(60):
        counts = Counter(example.id for example in mixture[index])
        assert len(counts) == 3
        assert sorted(counts.values()) == [2, 2, 3]


def test_text_only_examples():
    plain = source("plain", 5, text_only=True)
    assert all(m[0].image is None for m in Mixture([plain], seed=0, length=5))
    with pytest.raises(ValueError, match=r"source plain: example plain-0 has no image.*group = 1"):
        Mixture([source("a", 3), plain], seed=0, length=5, group=2)


@pytest.mark.parametrize(
    ("sources", "kwargs", "match"),
    [
        ([], {}, "none at all"),
        ([source("a", 0)], {}, "source a: has no examples"),
        ([source("a", 3, weight=0)], {}, "weight above 0"),
        ([source("a", 3, weight=-1)], {}, "source a: weight -1"),
        ([source("a", 3, weight=float("nan"))], {}, "source a: weight nan"),
        ([source("a", 3), source("a", 3)], {}, "same name"),
        ([source("a", 3)], {"seed": -1}, "seed -1"),
        ([source("a", 3)], {"length": -1}, "length must be"),
        ([source("a", 3)], {"group": 0}, "group >= 1"),
    ],
)
def test_refusals(sources, kwargs, match):
    with pytest.raises(ValueError, match=match):
        Mixture(sources, **({"seed": 0, "length": 5} | kwargs))


def test_large_seeds_and_indices():
    mixture = Mixture([source("a", 30)], seed=2**64 - 1, length=2**40)
    assert mixture[2**40 - 1] == mixture[2**40 - 1]


@pytest.mark.parametrize("group", [1, 10])
def test_a_draw_costs_the_same_however_many_examples_there_are(group):
    """In calls of functions; how long they take is `benchmarks/data.py`'s matter."""

    def calls(count: int) -> int:
        sources = [source(name, count, images=count // 15, weight=n + 1.0) for n, name in enumerate("abcd")]
        mixture, made = Mixture(sources, seed=0, length=10_000, group=group), 0

        def count_one(frame: object, event: str, arg: object) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(count_one)
        try:
            for index in range(200):
                mixture[index]
        finally:
            sys.setprofile(None)
        return made

    assert calls(6000) <= 1.5 * calls(600)
    assert calls(600) < 200 * 300 * group
