"""The demo's report and its runs: figures are those of the files, nothing comes from outside, failures are shown."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commvlm.app.charts import running_median
from commvlm.app.figures import apart, chance_scores, sentences
from commvlm.app.quickstart import Run, run_quickstart
from commvlm.app.report import write_report
from commvlm.app.showcase import choose
from commvlm.app.variants import VARIANTS, overrides
from commvlm.data.example import Example
from commvlm.evaluate.answerers import chance, majority, mute, oracle
from commvlm.evaluate.predictions import read_predictions
from commvlm.evaluate.run import predict, score
from commvlm.evaluate.scores import read_scores, write_scores
from commvlm.evaluate.tasks import Score
from commvlm.microworld.writer import write_world
from commvlm.train.recipe import as_yaml, load_recipe
from commvlm.train.sources import named_examples

TASKS = ("rec", "reg", "pope", "vqa", "caption")
PARTS = {
    "encoders": {"parameters": 3_241_472, "trained": 0, "lr": None},
    "merge": {"parameters": 201_228, "trained": 201_228, "lr": 5e-4},
    "align": {"parameters": 131_712, "trained": 131_712, "lr": 5e-4},
    "project": {"parameters": 32_896, "trained": 32_896, "lr": 5e-4},
    "language_model": {"parameters": 934_272, "trained": 934_272, "lr": 2e-4},
}
WEIGHTS = {"clip": {"1": 0.3217, "2": 0.6783}, "dinov2": {"5": 0.4441, "6": 0.5559}}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("demo") / "demo" / "world", train=2, test=24)


@pytest.fixture(scope="module")
def examples(world) -> list[Example]:
    recipe = load_recipe("micro")
    return [example for found in named_examples(recipe.evaluate.sources, world).values() for example in found]


@pytest.fixture(scope="module")
def demo(world, examples) -> Path:
    """A demo whose runs were answered by answerers without a model, and scored by the real thing."""
    folder = world.parent
    half_right, blind = oracle(examples), majority(examples)

    def comm(asked: Sequence[Example]) -> list[str]:
        """Right on every question whose id ends in an even digit, otherwise blind; caption 3 is hostile."""
        right, wrong = half_right(asked), blind(asked)
        texts = [r if e.id[-1] in "02468" else w for e, r, w in zip(asked, right, wrong, strict=True)]
        return ["<script>alert(1)</script>" if e.task == "caption" else t for e, t in zip(asked, texts, strict=True)]

    answerers = {"comm": comm, "clip-last": chance(examples), "random-twin": mute, "blind": blind}
    for name, answerer in answerers.items():
        fabricate(folder / name, name, world, examples, answerer)
    return folder


def fabricate(run: Path, name: str, world: Path, examples: Sequence[Example], answerer) -> None:
    scores = {}
    for task in TASKS:
        asked = [example for example in examples if example.task == task]
        scores |= score(predict(answerer, asked, run / "predictions" / f"{task}.jsonl", progress=None))
    write_scores(scores, run / "scores.json")
    (run / "recipe.yaml").write_text(as_yaml(load_recipe("micro", overrides(name, world=world))))
    facts = {"model": "model", "seconds": 83.4, "parts": PARTS, "layer_weights": WEIGHTS, "images": "given"}
    (run / "run.json").write_text(json.dumps(facts))
    rows = [
        {
            "stage": stage,
            "step": step,
            "of": of,
            "loss": 3 / (1 + step / 50),
            "seconds": step / 9,
            "layer_weights": WEIGHTS,
        }
        for stage, of in (("align", 900), ("instruct", 300))
        for step in range(10, of + 1, 10)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Rows of every table (cells as texts), attributes of every element, texts by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif tag in ("small", "br") and self.inside:
            self.tables[-1][-1][-1] += " | "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.inside:
            self.tables[-1][-1][-1] += data

    def table(self, number: int) -> dict[str, dict[str, str]]:
        """Row name -> column name -> cell."""
        head, *rows = self.tables[number]
        return {row[0].split(" | ")[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def text(demo) -> str:
    return write_report(demo).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


COLUMNS = {
    "rec": "REC acc@0.5",
    "reg": "REG CIDEr",
    "pope": "POPE accuracy",
    "vqa": "VQA accuracy",
    "caption": "caption CIDEr",
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_headline_table_shows_the_files_scores(demo, page, name):
    row = page.table(0)[VARIANTS[name].label]
    for task, values in json.loads((demo / name / "scores.json").read_text()).items():
        expected = f"{values['value']:.1f} ± {values['standard_error']:.1f} | n {values['n']}"
        if values["unparsable"]:
            expected += f" | {values['unparsable']} unparsable"
        assert row[COLUMNS[task]] == expected


def test_a_mute_runs_answers_are_counted_as_unparsable(page, examples):
    asked = sum(example.task == "rec" for example in examples)
    assert page.table(0)["random twin"]["REC acc@0.5"] == f"0.0 ± 0.0 | n {asked} | {asked} unparsable"


def test_groups_of_questions_are_counted_by_hand(demo, page, examples):
    table = page.table(1)
    said = {r.id: r.text for r in read_predictions(demo / "comm" / "predictions" / "pope.jsonl")}
    for name in ("random", "popular", "adversarial"):
        asked = [e for e in examples if e.task == "pope" and e.facts["set"] == name]
        right = 100 * np.mean([said[e.id] == e.turns[0].answer for e in asked])
        assert table["COMM"][f"POPE {name}"].startswith(f"{right:.1f} ± ")
        assert table["COMM"][f"POPE {name}"].endswith(f"n {len(asked)}")
    said = {r.id: r.text for r in read_predictions(demo / "comm" / "predictions" / "vqa.jsonl")}
    for kind in ("color", "count", "relation"):
        asked = [e for e in examples if e.task == "vqa" and e.facts["question_type"] == kind]
        right = 100 * np.mean([said[e.id] == e.turns[0].answer for e in asked])
        assert table["COMM"][f"VQA {kind}"].startswith(f"{right:.1f} ± ")
    assert list(table["COMM"])[1:4] == ["POPE random", "POPE popular", "POPE adversarial"]
    assert list(table) == ["COMM", "CLIP last layer", "random twin", "blind", "chance"]


def test_chance_is_the_best_constant_and_the_mean_box(page, examples):
    row = page.table(0)["chance"]
    assert row["POPE accuracy"].startswith("50.0 ± ")
    assert (row["REG CIDEr"], row["caption CIDEr"]) == ("–", "–")
    boxes = np.array([e.turns[0].answer_boxes[0][0] for e in examples if e.task == "rec"])
    mean = np.round(boxes.mean(0) / 64, 3) * 64
    low, high = np.maximum(boxes[:, :2], mean[:2]), np.minimum(boxes[:, 2:], mean[2:])
    shared = np.clip(high - low, 0, None).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (mean[2:] - mean[:2]).prod() - shared
    assert row["REC acc@0.5"].startswith(f"{100 * (shared / union >= 0.5).mean():.1f} ± ")
    vqa = [(e.facts["question_type"], e.turns[0].answer) for e in examples if e.task == "vqa"]
    kinds = {kind: [a for k, a in vqa if k == kind] for kind, _ in vqa}
    best = sum(max(answers.count(a) for a in answers) for answers in kinds.values()) / len(vqa)
    assert row["VQA accuracy"].startswith(f"{100 * best:.1f} ± ")


# What is said of the figures


def given(value: float, error: float | None) -> dict[str, Score]:
    return {"rec": Score("rec", "acc@0.5", "standard", value, error, None, 100, 0)}


LEVEL = "COMM stays at blind level"
UNKNOWN = "with fewer than two images there is no standard error to judge that by"


@pytest.mark.parametrize(
    ("own", "blind", "said"),
    [
        ((54.1, 1.5), (2.0, 0.4), "COMM is at 54.1 ± 1.5 on REC against 2.0 ± 0.4 blind."),
        ((5.0, 1.5), (2.0, 0.4), f"{LEVEL}: 5.0 ± 1.5 on REC against 2.0 ± 0.4 blind, within two standard errors."),
        ((2.0, 0.4), (9.0, 1.0), "COMM is below blind: 2.0 ± 0.4 on REC against 9.0 ± 1.0 blind."),
        ((50.0, 0.0), (50.0, 0.0), f"{LEVEL}: 50.0 ± 0.0 on REC against 50.0 ± 0.0 blind, within two standard errors."),
        ((50.0, 0.0), (40.0, 0.0), "COMM is at 50.0 ± 0.0 on REC against 40.0 ± 0.0 blind."),
        ((5.0, None), (2.0, None), f"COMM is at 5.0 on REC against 2.0 blind; {UNKNOWN}."),
    ],
)
def test_sentences_are_worded_by_the_numbers(own, blind, said):
    scores = {"COMM": given(*own), "blind": given(*blind)}
    assert sentences(scores, main="COMM", titles={"rec": "REC", "reg": "REG"}) == [said]


def test_rivals_are_compared_beyond_two_standard_errors_only():
    scores = {"COMM": given(50, 1), "above": given(54, 1), "near": given(52, 1), "below": given(10, 3)}
    (said,) = sentences(scores, main="COMM", titles={"rec": "REC"})
    assert said == (
        "COMM is 4.0 below above (54.0 ± 1.0). COMM and near (52.0 ± 1.0) do not differ by more than two standard errors. "
        "COMM is 40.0 above below (10.0 ± 3.0)."
    )
    assert apart(scores["COMM"]["rec"], scores["above"]["rec"]) == pytest.approx(-4 / math.sqrt(2))


def test_the_page_says_them(demo, page):
    scores = {VARIANTS[name].label: read_scores(demo / name / "scores.json") for name in VARIANTS}
    for sentence in sentences(scores, main="COMM", titles=COLUMNS):
        assert sentence in page.texts


# Pictures


def test_a_dozen_test_images_are_shown_with_their_boxes(page):
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 12
    assert len({p["alt"].split(" with ")[0] for p in pictures}) == 12  # of different images
    for picture in pictures:
        head, _, data = str(picture["src"]).partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
            assert image.size == (512, 512)


def test_the_choice_knows_no_success_and_failures_are_shown(demo, text):
    chosen = {}
    for name in ("comm", "random-twin"):
        records = {task: read_predictions(demo / name / "predictions" / f"{task}.jsonl") for task in TASKS}
        chosen[name] = [record.name for record in choose(records)]
    assert chosen["comm"] == chosen["random-twin"]
    assert chosen["comm"] != [record.name for record in choose(records, seed=1)]
    assert text.count('class="tag right"') > 0
    assert text.count('class="tag wrong"') > 0


def test_answers_are_text_and_never_markup(text, page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not [tag for tag, _ in page.elements if tag == "script"]


# One file


def test_nothing_comes_from_outside(text, page):
    assert "http" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "script", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset"):
                assert str(value).startswith(("data:image/png;base64,", "#")), (tag, name, str(value)[:60])
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements


def test_every_reference_inside_a_chart_is_there(text):
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        names = set(re.findall(r'id="([^"]+)"', chart))
        assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", chart)) <= names


def test_the_charts_show_stages_runs_and_layers(text):
    losses, layers = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for label in ("stage align", "stage instruct", *(variant.label for variant in VARIANTS.values())):
        assert f">{label}<" in losses
    for label in (
        "0.322",
        "0.678",
        "0.444",
        "0.556",
        "α, clip (dashed: uniform, 0.500)",
        "β, dinov2 (dashed: uniform, 0.500)",
    ):
        assert f">{label}<" in layers


def test_what_was_trained_and_how_to_do_it_again(page, text):
    trained = page.table(2)
    assert trained["language model"] == {
        **trained["language model"], "parameters": "934,272", "trained": "934,272",
    }  # fmt: skip
    assert trained["encoders"]["trained"] == "frozen"
    runs = page.table(3)
    assert runs["COMM"]["trained parameters"] == f"{201_228 + 131_712 + 32_896 + 934_272:,}"
    assert runs["COMM"]["training, min:s"] == "1:23"
    assert "commvlm quickstart --out" in text
    assert text.count("commvlm train micro --out") == text.count("commvlm evaluate") == 4
    assert "What the micro world is and is not" in text


def test_running_median():
    assert running_median([5, 1, 9, 2, 100], 3) == [3, 5, 2, 9, 51]
    assert running_median([1, 2], 5) == [1.5, 1.5]


def test_the_same_files_give_the_same_page(demo, text):
    assert write_report(demo).read_text(encoding="utf-8") == text


# What may be missing or broken


@pytest.fixture
def copied(demo, tmp_path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "demo", ignore=shutil.ignore_patterns("train", "report.html")))


def test_a_moved_demo_finds_its_images_and_controls_may_be_missing(copied, world):
    lines = (copied / "comm" / "predictions" / "rec.jsonl").read_text()
    (copied / "comm" / "predictions" / "rec.jsonl").write_text(lines.replace(str(world), "/gone"))
    shutil.rmtree(copied / "blind")
    (copied / "clip-last" / "scores.json").unlink()
    for name in ("comm", "random-twin"):
        (copied / name / "log.jsonl").unlink()  # as after fewer steps than one logging step
    page = Page(write_report(copied).read_text(encoding="utf-8"))
    assert list(page.table(0)) == ["COMM", "random twin", "chance"]
    assert sum(tag == "img" for tag, _ in page.elements) == 12


def test_without_comms_scores_there_is_no_report(copied):
    (copied / "comm" / "scores.json").unlink()
    with pytest.raises(ValueError, match=r"is not evaluated .*commvlm quickstart --out"):
        write_report(copied)
    assert not (copied / "report.html").exists()


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", "scores.json", "predictions/rec.jsonl"])
def test_a_broken_file_is_named(copied, name):
    (copied / "comm" / name).write_text('{"broken')
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        write_report(copied)
    assert "\n" not in str(error.value)


def test_cards_are_shown_beside_their_twins(demo, tmp_path):
    encoder = {
        "objective": "image-text contrastive", "views": 123456, "seconds": 1801.7, "layers": [1, 2],
        "best": {"trained": {"presence_auc": 0.8123, "rec": 0.41}, "random_twin": {"presence_auc": 0.6512, "rec": 0.3171}},
        "beats_twin": True,
    }  # fmt: skip
    language = {"objective": "symbols", "symbolic": {"rec": 0.9855}, "random_twin": {"rec": 0.0}, "beats_twin": False}
    for name, card in (("clip", encoder), ("lm", language)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "card.json").write_text(json.dumps(card))
    text = write_report(demo, cards=tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    clip, lm = page.table(4), page.table(5)
    assert clip["presence auc"] == {"score": "presence auc", "trained": "0.812", "random twin": "0.651"}
    assert clip["rec"] == {"score": "rec", "trained": "0.410", "random twin": "0.317"}
    assert lm["rec"] == {"score": "rec", "trained": "0.986", "random twin": "0.000"}
    assert "views: 123,456; seconds: 1802" in text
    assert "does not beat its random twin" in text
    empty = tmp_path / "none"
    empty.mkdir()
    assert "tiny checkpoints" not in write_report(demo, cards=empty).read_text(encoding="utf-8")


# The runs


def test_finished_runs_are_not_repeated(copied, world, capsys):
    shutil.copytree(world / "train", copied / "world" / "train")
    for name in VARIANTS:
        recipe = load_recipe("micro", overrides(name, world=(copied / "world").resolve()))
        (copied / name / "recipe.yaml").write_text(as_yaml(recipe))
    report = run_quickstart(copied, jobs=2, train=2, test=24)
    assert report == copied / "report.html"
    assert not (copied / "logs").exists()  # nothing was started
    assert json.loads((copied / "run.json").read_text()) == {"model": "comm/model"}
    assert "| rec     | acc@0.5 (standard)" in capsys.readouterr().out
    scores = (copied / "comm" / "scores.json").read_text()
    (copied / "comm" / "scores.json").write_text(json.dumps({"rec": json.loads(scores)["rec"]}))
    assert not Run("comm", copied, world, "micro").finished()  # evaluated on one task only


def test_a_folder_of_another_recipe_is_refused_before_anything_runs(copied, world):
    shutil.copytree(world / "train", copied / "world" / "train")
    with pytest.raises(ValueError, match=r"comm was made with another recipe .*data.root.*; remove .* or choose"):
        run_quickstart(copied, jobs=1, train=2, test=24)  # its recipes name the world it was copied from
    with pytest.raises(ValueError, match="jobs is 0"):
        run_quickstart(copied, jobs=0)


def test_chance_needs_no_task(demo):
    assert chance_scores({}) == {}
