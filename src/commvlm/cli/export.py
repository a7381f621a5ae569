"""export: a checkpoint as a folder for others, and onto the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import add_command


def add_export(commands: argparse._SubParsersAction) -> None:
    what = "write a checkpoint that needs nothing else: safetensors, processor, chat template, card, receipts, code"
    example = (
        "  commvlm export runs/demo micro-comm\n"
        "  commvlm export runs/comm-7b comm-7b --dtype bf16 --license llama2 --push-to-hub me/comm-7b"
    )
    parser = add_command(commands, "export", _export, what, example)
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its receipts go along) or a saved model's")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--name", help="in the card; the repository's, or the folder's, by default")
    parser.add_argument("--dtype", default="as-is", choices=("as-is", "fp32", "bf16", "fp16"), help="of the weights")
    parser.add_argument("--license", help="the hub's identifier, such as apache-2.0 or llama2; not said by default")
    parser.add_argument(
        "--no-code", action="store_true", help="without the modules that trust_remote_code=True loads the model with"
    )
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it afterwards, in one commit")
    parser.add_argument("--private", action="store_true", help="a new repository is private")


def _export(options: argparse.Namespace) -> None:
    from ..app.exporting import Export, export
    from ..app.hub import check_repository, push

    if options.push_to_hub:
        check_repository(options.push_to_hub)
    name = options.name or options.push_to_hub or options.out.absolute().name
    wanted = Export(name, dtype=options.dtype, license=options.license, code=not options.no_code)
    print(f"exported to {export(options.checkpoint, options.out, wanted)}")
    if options.push_to_hub:
        print(f"pushed to {push(options.out, options.push_to_hub, private=options.private)}")
