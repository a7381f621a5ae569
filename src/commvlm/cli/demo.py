"""demo: a checkpoint in the browser."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from .chat import whole
from .command import add_command, count


def add_demo(commands: argparse._SubParsersAction) -> None:
    what = "ask a checkpoint in the browser: boxes drawn and answered, what each encoder sees, parts switched off"
    example = "  commvlm demo runs/demo\n  commvlm demo runs/demo --port 8000 --history 0"
    parser = add_command(commands, "demo", _demo, what, example)
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a saved model's")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address that is listened at (127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=count, default=7860, metavar="N", help="port (7860)")
    parser.add_argument(
        "--history", type=whole, metavar="N", help="how many former turns go with a question (what it was trained for)"
    )
    parser.add_argument("--max-new-tokens", type=count, default=256, metavar="N", help="longest answer (256)")


def _demo(options: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise ValueError("the demo needs gradio, which is not installed: pip install 'commvlm[demo]'")
    from ..app.checkpoint import resolve_checkpoint

    resolve_checkpoint(options.checkpoint)
    from ..app.demo.serving import serve

    serve(
        options.checkpoint, host=options.host, port=options.port, history=options.history,
        max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
