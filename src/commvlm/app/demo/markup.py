"""The demo's own pieces of HTML: the dialogue, maps, layer weights, the answer beside the first, scenes, suggestions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ...data.boxes import box_iou
from ..conversation import Answer, Conversation, Piece, question_of, written
from ..drawing import ASKED, PREDICTED
from .seeing import Map
from .session import OFF, data_url

NOTHING_SAID = "Ask below, or take one of the suggestions. Boxes in answers appear on the image."
NO_POINT = "Click the image (or press Enter in it) to see which patches each encoder finds alike."


def dialogue(conversation: Conversation, question: str = "", growing: Answer | None = None) -> str:
    """What was said, boxes in pixels and in the colour that they have on the image. growing: the answer that is coming."""
    said = [(question_of(t), a) for t, a in zip(conversation.turns, conversation.answers, strict=True)]
    pairs = [(q, a, False) for q, a in said] + ([(question, growing, True)] if growing is not None else [])
    if not pairs:
        return f'<p class="soft">{NOTHING_SAID}</p>'
    return "".join(
        f'<div class="said asked"><span class="who">you</span>{escape(q)}</div>'
        f'<div class="said answered{" growing" * grows}"><span class="who">model</span>{answer_text(a, PREDICTED)}</div>'
        for q, a, grows in pairs
    )


def answer_text(answer: Answer, colors: Sequence[str]) -> str:
    """An answer with a coloured pill for each box. colors: in turn, as its boxes are drawn."""
    count, parts = 0, list[str]()
    for piece in answer.pieces:
        parts.append(escape(piece) if isinstance(piece, str) else _pills(piece, colors, count))
        count += 0 if isinstance(piece, str) else len(piece)
    return "".join(parts) or '<span class="soft">(no answer)</span>'


def _pills(piece: Piece, colors: Sequence[str], start: int) -> str:
    return " ".join(
        f'<span class="pill" style="--box:{colors[(start + k) % len(colors)]}">{escape(written((one,)))}</span>'  # type: ignore[arg-type]
        for k, one in enumerate(piece)
    )


def beside(first: Answer, off: str, second: Answer) -> str:
    """Two answers to one question, all on and something off, and whether they differ."""
    return (
        '<div class="beside">'
        f'<div><h4>all on</h4><p>{answer_text(first, PREDICTED)}</p></div>'
        f'<div><h4>without {escape(off)}</h4><p>{answer_text(second, (OFF,))}</p></div>'
        f'</div><p class="soft">{_difference(first, second)}</p>'
    )  # fmt: skip


def _difference(first: Answer, second: Answer) -> str:
    if first.text == second.text:
        return "The answer is the same."
    if len(first.boxes) == len(second.boxes) == 1:
        return f"The boxes overlap by {box_iou([first.boxes[0]], [second.boxes[0]])[0]:.2f} (intersection over union)."
    return "The answer has changed."


def maps(found: Sequence[Map]) -> str:
    """A row of maps an encoder."""
    if not found:
        return f'<p class="soft">{NO_POINT}</p>'
    rows = []
    for name in dict.fromkeys(one.encoder for one in found):
        tiles = "".join(
            f'<figure><img src="{data_url(one.picture)}" alt="{escape(name)}, {one.what}: cosine similarity to the marked '
            f'patch, from {one.low:.2f} to 1"><figcaption>{one.what}<br><span class="soft">{one.low:.2f} to 1</span>'
            "</figcaption></figure>"
            for one in found
            if one.encoder == name
        )
        rows.append(f'<h4>{escape(name)}</h4><div class="maps">{tiles}</div>')
    return "".join(rows)


def layer_weights(weights: Mapping[str, Mapping[int, float]]) -> str:
    """A bar a layer, an encoder below another; the dashed line is where all would be alike."""
    return "".join(_bars(name, list(layers.items())) for name, layers in weights.items())


def _bars(name: str, layers: Sequence[tuple[int, float]]) -> str:
    if not layers:
        return f'<h4>{escape(name)}</h4><p class="soft">Its merge has no weights to show.</p>'
    top = max(max(abs(weight) for _, weight in layers), 1e-9)
    even = 100 / len(layers) / top
    bars = "".join(
        f'<div class="bar" title="layer {layer}: {weight:.3f}"><span class="value">{weight:.2f}</span><span class="track">'
        f'<span class="column{" below" * (weight < 0)}" style="height:{100 * abs(weight) / top:.1f}%"></span></span>'
        f'<span class="layer">{layer}</span></div>'
        for layer, weight in layers
    )
    listed = ", ".join(f"layer {layer}: {weight:.3f}" for layer, weight in layers)
    return (
        f'<h4>{escape(name)}</h4><div class="bars{" many" * (len(layers) > 12)}" role="img" '
        f'aria-label="{escape(name)}, {listed}" style="--even:{min(even, 100):.1f}%">{bars}</div>'
    )


def thumbnails(pictures: Sequence[str], first: int) -> str:
    """Buttons with pictures, numbered from `first`."""
    return "".join(
        f'<button type="button" data-index="{first + k}" aria-label="scene {first + k}"><img src="{url}" alt=""></button>'
        for k, url in enumerate(pictures)
    )


def suggestions(texts: Sequence[str]) -> str:
    """Buttons that ask."""
    return "".join(f'<button type="button" data-text="{escape(text)}">{escape(text)}</button>' for text in texts)


LEGEND = (
    f'<span class="key" style="--box:{PREDICTED[0]}">answered</span> <span class="key" style="--box:{ASKED}">asked</span> '
    f'<span class="key dashed" style="--box:{OFF}">with parts off</span>'
)
