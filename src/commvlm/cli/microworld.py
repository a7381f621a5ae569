"""microworld: the rendered world and its tiny parts."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import add_command, count


def add_microworld(commands: argparse._SubParsersAction) -> None:
    what = "the micro world: rendered scenes with exact truth, and the tiny encoders pretrained on it"
    example = (
        "  commvlm microworld write world --train 6000 --test 1000\n"
        "  commvlm microworld pretrain clip --out .cache/encoders/clip --minutes 60\n"
        "  commvlm microworld card .cache/encoders/clip/model"
    )
    group = add_command(commands, "microworld", lambda options: None, what, example)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    write = add_command(
        inner,
        "write",
        _write,
        "write scenes as PNG and annotations in the real formats",
        "  commvlm microworld write world",
    )
    write.add_argument("folder", type=Path)
    write.add_argument("--train", type=count, default=6000, help="training scenes")
    write.add_argument("--test", type=count, default=1000, help="test scenes")
    write.add_argument("--difficulty", default="easy", help="easy or hard")
    pretrain = add_command(
        inner, "pretrain", _pretrain, "pretrain a tiny encoder or the tiny language model; resumes",
        "  commvlm microworld pretrain dinov2 --out .cache/encoders/dinov2",
    )  # fmt: skip
    pretrain.add_argument("which", choices=("clip", "dinov2", "mae", "deit", "lm"))
    pretrain.add_argument("--out", type=Path, required=True, help="folder of progress, log and model")
    pretrain.add_argument("--cache", type=Path, default=Path(".cache/pretrain"), help="folder of drawn scenes")
    pretrain.add_argument("--updates", type=count, help="the whole run's updates, for the schedule")
    pretrain.add_argument(
        "--scenes", type=count, help="scenes that an encoder learns from (40,000; the LM draws new ones)"
    )
    pretrain.add_argument("--seed", type=int, help="of weights and draws (0, as shipped)")
    pretrain.add_argument("--minutes", type=float, help="stop after so many; the next call goes on")
    card = add_command(
        inner, "card", _card, "score a pretrained part beside its random twin and write its card",
        "  commvlm microworld card .cache/encoders/clip/model",
    )  # fmt: skip
    card.add_argument("folder", type=Path, help="a pretrained model's folder")


def _write(options: argparse.Namespace) -> None:
    from ..microworld.writer import write_world

    print(write_world(options.folder, train=options.train, test=options.test, difficulty=options.difficulty))


def _pretrain(options: argparse.Namespace) -> None:
    from ..microworld.pretrain.run import pretrain

    limits = {"updates": options.updates, "scenes": options.scenes, "seed": options.seed, "minutes": options.minutes}
    print(pretrain(options.which, options.out, cache=options.cache, **limits))


def _card(options: argparse.Namespace) -> None:
    from ..microworld.cards import write_card

    print(write_card(options.folder))
