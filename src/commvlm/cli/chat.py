"""chat and demo: talk to a checkpoint, in the terminal or in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import add_command, count


def add_chat(commands: argparse._SubParsersAction) -> None:
    what = "ask a checkpoint about an image; boxes go in and come out in its pixels, and are drawn"
    example = (
        '  commvlm chat runs/demo --image scene.png "where is the red star?"\n'
        '  commvlm chat runs/demo --image scene.png "what is in [10,20,30,40]?"      a box, in pixels of the image\n'
        '  commvlm chat runs/demo --image scene.png --knock-out dinov2 "where is the red star?"\n'
        "  commvlm chat runs/demo --image scene.png                                  a conversation"
    )
    parser = add_command(commands, "chat", _chat, what, example)
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a saved model's")
    parser.add_argument("question", nargs="?", help="one question; none starts a conversation")
    parser.add_argument("--image", type=Path, help="the image that is asked about")
    parser.add_argument(
        "--out", type=Path, default=Path("answer.png"), help="where answers with boxes are drawn (answer.png)"
    )
    parser.add_argument(
        "--knock-out", default="", metavar="WHAT", help="encoders and layers that are off: dinov2, clip:1-8"
    )
    parser.add_argument(
        "--history", type=whole, metavar="N", help="how many former turns go with a question (what it was trained for)"
    )
    parser.add_argument("--max-new-tokens", type=count, default=256, metavar="N", help="longest answer (256)")


def whole(text: str) -> int:
    """A number from 0."""
    return 0 if text == "0" else count(text)


def _chat(options: argparse.Namespace) -> None:
    from ..app.chat import chat

    chat(
        options.checkpoint, options.question, image=options.image, out=options.out, knock_out=options.knock_out,
        history=options.history, max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
