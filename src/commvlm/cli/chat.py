"""chat: talk to a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import add_command


def add_chat(commands: argparse._SubParsersAction) -> None:
    what = "ask a checkpoint about an image; boxes in the answer are drawn and saved"
    example = (
        '  commvlm chat runs/demo --image scene.png "where is the red star?"\n'
        "  commvlm chat runs/demo --image scene.png          (a conversation)"
    )
    parser = add_command(commands, "chat", _chat, what, example)
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a saved model's")
    parser.add_argument("question", nargs="?", help="one question; none starts a conversation")
    parser.add_argument("--image", type=Path, help="the image that is asked about")
    parser.add_argument(
        "--out", type=Path, default=Path("answer.png"), help="where the picture with its boxes is saved"
    )


def _chat(options: argparse.Namespace) -> None:
    from ..app.chat import chat

    chat(options.checkpoint, options.question, image=options.image, out=options.out)
