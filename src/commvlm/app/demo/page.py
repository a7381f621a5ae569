"""The demo's page in gradio: what is where, and which event changes what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ...microworld.scene import render, sample_scene
from ...model.layers import describe_layers
from ..answering import Answerer
from ..conversation import Answer, written
from . import markup
from .session import MAX_QUESTION, Session, data_url

HERE = Path(__file__).parent
SCENES = 10
"""Thumbnails at a time."""
IDLE = 3600
"""Seconds after which a visitor's images are removed."""
STAGE = (
    '<div class="stage"></div><div class="tools" role="group" aria-label="what a click does">'
    '<button type="button" data-mode="point" aria-pressed="true">Point</button>'
    '<button type="button" data-mode="box" aria-pressed="false">Box</button>'
    '<button type="button" data-clear="1">Clear</button>'
    '<span class="tell" role="status" aria-live="polite">Click a point; a drag draws a box.</span></div>'
)
CHOOSE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button) trigger('choose', {...button.dataset});
});
"""
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Events that need the model wait for one another."""


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose ValueErrors are said on the page, in one line, and change nothing."""

    def say(error: ValueError) -> Any:
        gr.Warning(" ".join(str(error).split()), duration=12, title="Not like this")
        return gr.skip()

    @wraps(handler)
    def whole(*given: Any) -> Any:
        try:
            return handler(*given)
        except ValueError as error:
            return say(error)

    @wraps(handler)
    def growing(*given: Any) -> Iterator[Any]:
        try:
            yield from handler(*given)
        except ValueError as error:
            yield say(error)

    return growing if isgeneratorfunction(handler) else whole


class Page:
    """Handlers of the page's events. history: how many former turns go with a question at first; None is all."""

    def __init__(self, answerer: Answerer, *, title: str, history: int | None) -> None:
        self.answerer, self.title, self.history = answerer, title, history
        vision: Any = answerer.model.model.vision_tower
        self.layers = {branch["name"]: branch["layers"] for branch in vision.config.branches}
        self.weights = vision.layer_weights()

    # What is where

    def build(self) -> gr.Blocks:
        """The page, with its events; to be launched."""
        with gr.Blocks(title=f"commvlm: {self.title}", analytics_enabled=False, delete_cache=(600, IDLE)) as page:
            self.session = gr.State(None, time_to_live=IDLE, delete_callback=_close)
            self.first = gr.State(0)
            gr.HTML(self._head(), elem_id="head", apply_default_css=False)
            with gr.Row():
                with gr.Column(scale=6, min_width=340):
                    self._image_side()
                with gr.Column(scale=5, min_width=340):
                    self._panel()
            self._events(page)
        return page

    def _head(self) -> str:
        seen = "; ".join(f"{name} layers {describe_layers(layers)}" for name, layers in self.layers.items())
        title = f"<h1>COMM <small>{escape(self.title)}</small></h1>"
        return f'{title}<p class="soft">{escape(seen)}. {markup.LEGEND}</p>'

    def _image_side(self) -> None:
        self.stage = gr.HTML(
            None, html_template=STAGE, js_on_load=(HERE / "stage.js").read_text(encoding="utf-8"), picture="",
            elem_id="stage", apply_default_css=False,
        )  # fmt: skip
        self.scenes = gr.HTML(
            self._thumbnails(0), js_on_load=CHOOSE, elem_id="scenes",
            html_template='<div class="scenes" role="group" aria-label="scenes">${value}</div>', apply_default_css=False,
        )  # fmt: skip
        with gr.Row():
            self.upload = gr.UploadButton(
                "Upload an image", file_types=["image"], size="sm", min_width=120, elem_id="upload"
            )
            self.more = gr.Button("Other scenes", size="sm", min_width=120)
        with gr.Column(elem_id="panel-talk"):
            self.talk = gr.HTML(
                "", html_template='<div class="talk" role="log" aria-live="polite" aria-label="dialogue">${value}</div>',
                elem_id="talk", apply_default_css=False,
            )  # fmt: skip
            self.chips = gr.HTML(
                "", html_template='<div class="chips" role="group" aria-label="suggested questions">${value}</div>',
                js_on_load=CHOOSE, elem_id="chips", apply_default_css=False,
            )  # fmt: skip
            self.question = gr.Textbox(
                label="Question", placeholder="where is the red star?   what is in [10,20,30,40]?", lines=1,
                max_length=MAX_QUESTION, submit_btn="Ask", elem_id="question",
            )  # fmt: skip
            with gr.Row():
                self.remembers = gr.Checkbox(self.history is None, label="with the dialogue so far", min_width=160)
                self.anew = gr.Button("New dialogue", size="sm", min_width=120)

    def _panel(self) -> None:
        with gr.Column(elem_id="panel-maps"):
            gr.HTML("<h3>What each encoder finds alike</h3>", apply_default_css=False)
            self.maps = gr.HTML(markup.maps([]), elem_id="maps", apply_default_css=False)
        with gr.Column(elem_id="panel-weights"):
            gr.HTML("<h3>Layer weights that it has learned</h3>", apply_default_css=False)
            gr.HTML(markup.layer_weights(self.weights), elem_id="weights", apply_default_css=False)
        with gr.Column(elem_id="panel-off"):
            gr.HTML("<h3>Switch parts off, ask again</h3>", apply_default_css=False)
            self.encoders = gr.CheckboxGroup(list(self.layers), label="Encoders")
            self.single = [
                gr.CheckboxGroup([(str(layer), f"{name}:{layer}") for layer in layers], label=f"Layers of {name}")
                for name, layers in self.layers.items()
            ]  # fmt: skip
            self.again = gr.Button("Ask again without them", variant="primary", elem_id="again")
            self.beside = gr.HTML("", elem_id="beside", apply_default_css=False)

    def _events(self, page: gr.Blocks) -> None:
        image = [self.session, self.stage, self.talk, self.chips, self.maps, self.beside, self.question]
        asked = [self.session, self.stage, self.talk, self.question, self.beside]
        marked = [self.session, self.stage, self.maps, self.chips, self.question]
        page.load(self.begin, None, image, **MODEL)
        self.scenes.choose(self.pick, [self.session], image, **MODEL)
        self.upload.upload(self.uploaded, [self.session, self.upload], image, **MODEL)
        self.more.click(
            lambda first: (first + SCENES, self._thumbnails(first + SCENES)), self.first, [self.first, self.scenes],
            api_visibility="private",
        )  # fmt: skip
        self.question.submit(self.ask, [self.session, self.question], asked, **MODEL)
        self.chips.choose(self.ask_suggested, [self.session], asked, **MODEL)
        self.stage.place(self.placed, [self.session], marked, trigger_mode="always_last", **MODEL)
        self.stage.mark(self.marked, [self.session], marked, trigger_mode="always_last", **MODEL)
        self.stage.clear(self.cleared, [self.session], marked, **MODEL)
        self.anew.click(self.forgotten, [self.session], asked, **MODEL)
        self.remembers.change(self.remembered, [self.session, self.remembers], self.session, **MODEL)
        off = [self.session, self.encoders, *self.single]
        self.again.click(self.asked_again, off, [self.session, self.stage, self.beside], **MODEL)

    def _thumbnails(self, first: int) -> str:
        pictures = [data_url(Image.fromarray(render(sample_scene("test", first + k)))) for k in range(SCENES)]
        return markup.thumbnails(pictures, first)

    # Another image

    def _session(self, session: Session | None) -> Session:
        return session or Session(self.answerer, self.history)

    def _image(self, session: Session) -> tuple[Any, ...]:
        chips = markup.suggestions(session.suggestions())
        stage = gr.HTML(value=session.stage(), picture=session.picture())
        return session, stage, markup.dialogue(session.about), chips, markup.maps(session.maps()), "", ""

    @told
    def begin(self) -> tuple[Any, ...]:
        return self.show(lambda session: session.pick(0), None)

    def show(self, turn: Callable[[Session], None], session: Session | None) -> tuple[Any, ...]:
        """The page about the image that `turn` turns to."""
        session = self._session(session)
        turn(session)
        return self._image(session)

    @told
    def pick(self, session: Session | None, event: gr.EventData) -> tuple[Any, ...]:
        return self.show(lambda session: session.pick(_index(event._data)), session)

    @told
    def uploaded(self, session: Session | None, path: str) -> tuple[Any, ...]:
        return self.show(lambda session: session.upload(Path(path)), session)

    # Questions

    @told
    def ask(self, session: Session | None, question: str) -> Iterator[tuple[Any, ...]]:
        session = self._session(session)
        for answer in session.ask(question):
            talk = markup.dialogue(session.about, question, answer)
            yield session, session.stage(answer), talk, gr.skip(), gr.skip()
        yield session, session.stage(), markup.dialogue(session.about), "", ""

    @told
    def ask_suggested(self, session: Session | None, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        yield from self.ask(session, str(event._data.get("text", "")))

    @told
    def asked_again(
        self, session: Session | None, encoders: list[str], *layers: list[str]
    ) -> Iterator[tuple[Any, ...]]:
        session = self._session(session)
        single = [layer for one in layers for layer in one if layer.split(":")[0] not in encoders]
        for _ in session.ask_without([*encoders, *single]):
            off, answer = session.without or ("", Answer(""))
            yield session, session.stage(), markup.beside(session.about.answers[-1], off, answer)

    @told
    def forgotten(self, session: Session | None) -> tuple[Any, ...]:
        session = self._session(session)
        session.anew()
        return session, session.stage(), markup.dialogue(session.about), "", ""

    @told
    def remembered(self, session: Session | None, all_of_it: bool) -> Session:
        session = self._session(session)
        session.remember(None if all_of_it else 0)
        return session

    # Marks

    @told
    def placed(self, session: Session | None, event: gr.EventData) -> tuple[Any, ...]:
        session = self._session(session)
        x, y = session.mark_point(event._data.get("point"))
        return self._marked(session, (f"What is at {written(((x, y),))}?",), gr.skip())

    @told
    def marked(self, session: Session | None, event: gr.EventData) -> tuple[Any, ...]:
        session = self._session(session)
        box = written((session.mark_box(event._data.get("box")),))
        asked = f"What is at {box}?"
        return self._marked(session, (asked, f"Describe the object at {box} in a short phrase."), asked)

    @told
    def cleared(self, session: Session | None) -> tuple[Any, ...]:
        session = self._session(session)
        session.point = session.box = None
        return self._marked(session, (), "")

    def _marked(self, session: Session, asked: tuple[str, ...], question: Any) -> tuple[Any, ...]:
        chips = markup.suggestions((*asked, *session.suggestions()))
        return session, session.stage(), markup.maps(session.maps()), chips, question


def _index(data: dict[str, Any]) -> int:
    """The scene that a thumbnail names. Raises ValueError for anything else."""
    said = str(data.get("index", ""))
    if not said.isdecimal() or len(said) > 6:
        raise ValueError(f"there is no scene {said[:20]!r}")
    return int(said)


def _close(session: Session | None) -> None:
    if session is not None:
        session.close()
