"""serve: a checkpoint behind OpenAI's chat completions."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .command import add_command, count


def add_serve(commands: argparse._SubParsersAction) -> None:
    what = "answer OpenAI's chat completions with a checkpoint; requests that arrive together are answered together"
    example = (
        "  commvlm serve runs/demo\n"
        "  COMMVLM_API_KEY=secret commvlm serve runs/comm-7b --host 0.0.0.0 --port 8080 --precision bf16 --name comm-7b\n"
        "  curl http://127.0.0.1:8000/v1/models"
    )
    parser = add_command(commands, "serve", _serve, what, example)
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a saved model's")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine alone by default")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", help="what clients call the model; the folder's name by default")
    parser.add_argument(
        "--api-key", help="what clients must send; better in the environment, as COMMVLM_API_KEY. None asks for none"
    )
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16 is autocast")
    parser.add_argument(
        "--bits", type=int, choices=(8, 4), help="of the language model's linear layers, through bitsandbytes"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu; the GPU by default where there is one")
    parser.add_argument("--max-tokens", type=count, default=256, help="of an answer")
    parser.add_argument("--max-batch", type=count, default=32, help="answers that grow at once")
    parser.add_argument("--max-queue", type=count, default=128, help="requests that wait; more are answered 429")
    parser.add_argument("--max-body", type=count, default=20, help="megabytes of a request")
    parser.add_argument("--max-side", type=count, default=6000, help="pixels of an image's longer side")
    parser.add_argument("--timeout", type=count, default=120, help="seconds until an answer must be whole")


def _serve(options: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}: pip install 'commvlm[serve]'") from error
    from ..app.serving.limits import MEGABYTE, Limits
    from ..app.serving.run import Place, serve

    if not 0 <= options.port < 65536:
        raise ValueError(f"there is no port {options.port}; give one from 0 to 65535")
    limits = Limits(
        body=options.max_body * MEGABYTE, bodies=max(Limits.bodies, options.max_body * MEGABYTE), side=options.max_side,
        tokens=options.max_tokens, batch=options.max_batch, queue=options.max_queue, seconds=options.timeout,
    )  # fmt: skip
    key = options.api_key or os.environ.get("COMMVLM_API_KEY") or None
    place = Place(host=options.host, port=options.port, name=options.name, key=key, limits=limits)
    serve(
        options.checkpoint, place, precision=options.precision, device=options.device, bits=options.bits
    )  # fmt: skip
