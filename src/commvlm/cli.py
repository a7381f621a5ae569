"""The command line: parses, calls, prints. Bad input is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .train.recipe import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = _parser()
    given, dotted = _split(sys.argv[1:] if argv is None else argv)
    options, rest = parser.parse_known_args(given)
    options.overrides = [*dotted, *rest]
    try:
        _settle_rest(options)
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        print(f"commvlm: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("commvlm: interrupted; the same command resumes", file=sys.stderr)
        return 130


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and options with a dot in their name, each with its value: keys of the recipe.

    Apart, so that such an option may stand anywhere, in front of the recipe as well.
    """
    own, dotted = [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w[^\s=]*\.", word):
            own.append(word)
            continue
        dotted.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            dotted.append(words.pop(0))
    return own, dotted


def _settle_rest(options: argparse.Namespace) -> None:
    """What argparse could not place: keys of a recipe, or chat's question behind an option, which it overlooks there."""
    rest = options.overrides
    if options.command == "chat" and options.question is None and len(rest) == 1 and not rest[0].startswith("--"):
        options.question = rest.pop()
    if rest and not options.overridable:
        raise ValueError(f"unknown option {rest[0]!r} for {options.command}; see commvlm {options.command} --help")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"commvlm: error: {message}; see {self.prog} --help\n")


def _count(text: str) -> int:
    """A number from 1."""
    if not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few, at least 1")
    return int(text)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="commvlm", description="COMM: several vision encoders, several layers each, read by a language model."
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=f"commvlm {version('commvlm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_inspect, _add_build, _add_train, _add_evaluate, _add_chat, _add_microworld, _add_quickstart):
        add(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run, what: str, example: str, overridable: bool = False):
    parser = commands.add_parser(
        name, help=what, description=what, epilog=f"examples:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.set_defaults(run=run, overridable=overridable)
    return parser


RECIPE = "a YAML file, or a shipped recipe's name"
OVERRIDES = "  any key of the recipe is an option: --train.seed 1 --data.root DIR"


def _recipe(options: argparse.Namespace) -> Recipe:
    """The command's recipe. Read before torch is imported: a slip is answered at once."""
    from .train.recipe import load_recipe

    return load_recipe(options.recipe, options.overrides)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    what = "parameters, layers, grid, visual tokens and FLOPs of a recipe, part by part; nothing is allocated"
    example = "  commvlm inspect recipes/comm-7b.yaml\n  commvlm inspect micro --json\n" + OVERRIDES
    parser = _command(commands, "inspect", _inspect, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _inspect(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from .model.build import build_config
    from .model.cost import as_json, as_table, inspect_model
    from .train.assemble import encoder_spec, located

    config = build_config(
        [encoder_spec(encoder) for encoder in recipe.model.encoders],
        language_model=located(recipe.model.language_model), fuse=recipe.model.fuse, project=recipe.model.project,
    )  # fmt: skip
    trains = recipe.train.stages[-1].trains if recipe.train.stages else {}
    rows = inspect_model(config, **({"trains": tuple(trains)} if trains else {}))
    print(json.dumps(as_json(rows), indent=1) if options.json else as_table(rows))


def _add_build(commands: argparse._SubParsersAction) -> None:
    what = "assemble a recipe's model from its checkpoints and save it as a transformers checkpoint"
    example = (
        "  commvlm build recipes/comm-7b.yaml --out comm-7b-start\n"
        "  commvlm build micro --weights random --out start\n" + OVERRIDES
    )
    parser = _command(commands, "build", _build, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--weights", default="checkpoint", choices=("checkpoint", "random"), help="random needs configs only"
    )


def _build(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    if options.out.exists():
        raise ValueError(f"{options.out} exists: choose another --out")
    from .train.assemble import assemble
    from .train.whole import save_whole

    model, processor = assemble(recipe.model, weights=options.weights, seed=recipe.train.seed)
    save_whole(options.out, model, processor)
    total = sum(p.numel() for p in model.parameters())
    print(f"{options.out}: {total:,} parameters, {model.config.num_image_tokens} visual tokens an image")


def _add_train(commands: argparse._SubParsersAction) -> None:
    what = "train a recipe's stages; the same command resumes an interrupted run"
    example = "  commvlm microworld write world\n  commvlm train micro --out runs/first --data.root world\n" + OVERRIDES
    parser = _command(commands, "train", _train, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--weights", default="checkpoint", choices=("checkpoint", "random"), help="random needs configs only"
    )


def _train(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from .train.run import train

    print(f"the model is in {train(recipe, options.out, weights=options.weights)}")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    what = "ask a trained run its recipe's questions, keep the answers, score them"
    example = "  commvlm evaluate runs/first\n  commvlm evaluate runs/first --tasks rec,pope\n" + OVERRIDES
    parser = _command(commands, "evaluate", _evaluate, what, example, overridable=True)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a folder made by commvlm train")
    parser.add_argument("--tasks", default="", help="comma-separated; all that the recipe names by default")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")


def _evaluate(options: argparse.Namespace) -> None:
    from .app.evaluation import evaluate_run
    from .evaluate.scores import scores_table

    tasks = tuple(name.strip() for name in options.tasks.split(",") if name.strip())
    scores = evaluate_run(options.run_folder, tasks=tasks, overrides=options.overrides)
    if options.json:
        print(json.dumps({name: score.as_json() for name, score in scores.items()}, indent=1))
    else:
        print(scores_table({options.run_folder.name: scores}))


def _add_chat(commands: argparse._SubParsersAction) -> None:
    what = "ask a checkpoint about an image; boxes in the answer are drawn and saved"
    example = (
        '  commvlm chat runs/demo --image scene.png "where is the red star?"\n'
        "  commvlm chat runs/demo --image scene.png          (a conversation)"
    )
    parser = _command(commands, "chat", _chat, what, example)
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a saved model's")
    parser.add_argument("question", nargs="?", help="one question; none starts a conversation")
    parser.add_argument("--image", type=Path, help="the image that is asked about")
    parser.add_argument(
        "--out", type=Path, default=Path("answer.png"), help="where the picture with its boxes is saved"
    )


def _chat(options: argparse.Namespace) -> None:
    from .app.chat import chat

    chat(options.checkpoint, options.question, image=options.image, out=options.out)


def _add_microworld(commands: argparse._SubParsersAction) -> None:
    what = "the micro world: rendered scenes with exact truth, and the tiny encoders pretrained on it"
    example = (
        "  commvlm microworld write world --train 6000 --test 1000\n"
        "  commvlm microworld pretrain clip --out .cache/encoders/clip --minutes 60\n"
        "  commvlm microworld card clip"
    )
    group = _command(commands, "microworld", lambda options: None, what, example)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    write = _command(
        inner,
        "write",
        _write,
        "write scenes as PNG and annotations in the real formats",
        "  commvlm microworld write world",
    )
    write.add_argument("folder", type=Path)
    write.add_argument("--train", type=_count, default=6000, help="training scenes")
    write.add_argument("--test", type=_count, default=1000, help="test scenes")
    write.add_argument("--difficulty", default="easy", help="easy or hard")
    pretrain = _command(
        inner, "pretrain", _pretrain, "pretrain a tiny encoder or the tiny language model; resumes",
        "  commvlm microworld pretrain dinov2 --out .cache/encoders/dinov2",
    )  # fmt: skip
    pretrain.add_argument("which", choices=("clip", "dinov2", "lm"))
    pretrain.add_argument("--out", type=Path, required=True, help="folder of progress, log and model")
    pretrain.add_argument("--cache", type=Path, default=Path(".cache/pretrain"), help="folder of drawn scenes")
    pretrain.add_argument("--updates", type=_count, help="the whole run's updates, for the schedule")
    pretrain.add_argument("--minutes", type=float, help="stop after so many; the next call goes on")
    card = _command(
        inner, "card", _card, "score a pretrained part beside its random twin and write its card",
        "  commvlm microworld card .cache/encoders/clip/model",
    )  # fmt: skip
    card.add_argument("folder", type=Path, help="a pretrained model's folder")


def _write(options: argparse.Namespace) -> None:
    from .microworld.writer import write_world

    print(write_world(options.folder, train=options.train, test=options.test, difficulty=options.difficulty))


def _pretrain(options: argparse.Namespace) -> None:
    from .microworld.pretrain.run import pretrain

    print(pretrain(options.which, options.out, cache=options.cache, updates=options.updates, minutes=options.minutes))


def _card(options: argparse.Namespace) -> None:
    from .microworld.cards import write_card

    print(write_card(options.folder))


def _add_quickstart(commands: argparse._SubParsersAction) -> None:
    what = "train and evaluate COMM beside its controls on the micro world, and write the report (make demo)"
    parser = _command(commands, "quickstart", _quickstart, what, "  commvlm quickstart --out runs/demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    parser.add_argument("--jobs", type=_count, default=2, help="runs side by side, one core each")


def _quickstart(options: argparse.Namespace) -> None:
    from .app.quickstart import run_quickstart

    print(run_quickstart(options.out, jobs=options.jobs))


if __name__ == "__main__":
    sys.exit(main())
