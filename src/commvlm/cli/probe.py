"""probe: what frozen encoders give, layer by layer, before anything is trained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .command import OVERRIDES, RECIPE, add_command, count, recipe_of

ENCODER = (
    "a shipped tiny one (clip, dinov2, mae, deit), a folder, a hub id, NAME=any of these; micro: all shipped tiny ones"
)
WEIGHTS = "random needs configs only"


def add_probe(commands: argparse._SubParsersAction) -> None:
    what = "read frozen encoders, layer by layer, before a language model is trained on them"
    example = (
        "  commvlm probe micro --out runs/probe\n"
        "  commvlm probe openai/clip-vit-large-patch14-336 dino=./dinov2-large --data refcoco --images train2014\n"
        "  commvlm probe simmap cats.png --at 120,80 --encoders clip,dinov2 --layers 4,8\n"
        "  commvlm probe advise runs/probe --tasks rec,presence"
    )
    group = add_command(commands, "probe", lambda options: None, what, example, overridable=True)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_layers(inner)
    _add_report(inner)
    _add_maps(inner)
    _add_advise(inner)
    _add_features(inner)
    parse = group.parse_known_args

    def parse_known_args(args: Sequence[str] = (), namespace: argparse.Namespace | None = None) -> tuple:
        """`commvlm probe clip` is `commvlm probe layers clip`."""
        words = list(args)
        named = bool(words) and (words[0] in inner.choices or words[0] in ("-h", "--help"))
        return parse(words if named or not words else ["layers", *words], namespace)

    group.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]


def _add_layers(inner: argparse._SubParsersAction) -> None:
    parser = add_command(
        inner, "layers", _layers,
        "curves of every layer of encoders and of their controls: where is it, is it there, what is it; resumes",
        "  commvlm probe micro --out runs/probe                  (the word layers may be left out)\n"
        "  commvlm probe clip dinov2 --data micro:hard --tasks rec,presence --seeds 5 --out runs/hard\n"
        "  commvlm probe openai/clip-vit-large-patch14-336 --data refcoco --images train2014 --layers 4,8,12,16,20,24\n"
        "  commvlm probe facebook/dinov2-large --weights random --image-size 336 --data lines.jsonl",
    )  # fmt: skip
    parser.add_argument("encoders", nargs="+", metavar="ENCODER", help=ENCODER)
    parser.add_argument(
        "--layers", default="all", help="of every encoder: all, half, 12, 1-8, -1, or several, with commas"
    )
    parser.add_argument("--tasks", default="", help="rec, presence, category, region; all by default")
    parser.add_argument(
        "--data", default="micro", help="micro, micro:hard, or a folder or file of referring expressions"
    )
    parser.add_argument("--images", type=Path, help="folder of the images; DATA/images by default")
    parser.add_argument("--train", type=count, default=2000, help="images that heads are fitted on, at most (2000)")
    parser.add_argument("--test", type=count, default=1000, help="images that are asked about, at most (1000)")
    parser.add_argument("--seeds", type=count, default=3, help="of the heads (3)")
    parser.add_argument("--heads", default="linear,mlp", help="linear, mlp, or both")
    parser.add_argument("--steps", type=count, default=400, help="updates of a head (400)")
    parser.add_argument("--weights", default="checkpoint", choices=("checkpoint", "random"), help=WEIGHTS)
    parser.add_argument("--image-size", type=count, help="side in pixels; what each was trained on by default")
    parser.add_argument("--no-twins", action="store_true", help="leave the random-initialised twins out")
    parser.add_argument("--no-merges", action="store_true", help="leave means and LLN-Layerscale over layers out")
    parser.add_argument("--kept", default="bf16", choices=("fp32", "bf16", "int8"), help="how features are kept (bf16)")
    parser.add_argument("--batch", type=count, default=32, help="images encoded at once (32)")
    parser.add_argument("--jobs", type=count, default=2, help="processes that fit heads, one core each (2)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/probe"), help="folder of features, results and report.html"
    )


def _listed(text: str, valid: Sequence[str], what: str) -> tuple[str, ...]:
    """Comma-separated names; all valid ones where there are none. Raises ValueError for another, naming the nearest."""
    from ..model.names import choice

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return tuple(choice(name, of=tuple(valid), what=what) for name in names) or tuple(valid)


def _layers(options: argparse.Namespace) -> None:
    from ..probe.heads import HEADS
    from ..probe.run import Settings
    from ..probe.tasks import TASKS, Effort

    settings = Settings(
        layers=options.layers, tasks=_listed(options.tasks, TASKS, "task"), heads=_listed(options.heads, list(HEADS), "head"),
        seeds=options.seeds, twins=not options.no_twins, merges=not options.no_merges, kept=options.kept,
        effort=Effort(steps=options.steps),
    )  # fmt: skip
    from ..app.probing import encoder_specs, probe, problem_of

    encoders = encoder_specs(options.encoders, weights=options.weights, image_size=options.image_size)
    problem = problem_of(options.data, images=options.images, train=options.train, test=options.test)
    page = probe(encoders, problem, options.out, settings=settings, jobs=options.jobs, batch=options.batch)
    print(f"the page is {page}")


def _add_report(inner: argparse._SubParsersAction) -> None:
    parser = add_command(
        inner, "report", _report, "the page and findings.md again, from a probe's results",
        "  commvlm probe report runs/probe --into docs/findings.md",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="a probe's folder")
    parser.add_argument("--into", type=Path, help="a Markdown page between whose marks the findings are put, too")


def _report(options: argparse.Namespace) -> None:
    from ..app.probe_report import write_into, write_probe_report

    if options.into is not None:
        write_into(options.into, options.out)
    print(f"the page is {write_probe_report(options.out)}")


def _add_maps(inner: argparse._SubParsersAction) -> None:
    about = {
        "simmap": "how alike one patch's token is to all others, encoders and layers side by side (the paper's Figure 1)",
        "pca": "the first three principal components of each layer's tokens as red, green and blue",
    }
    for name, what in about.items():
        at = " --at 120,80" if name == "simmap" else ""
        example = f"  commvlm probe {name} cats.png{at} --encoders clip,dinov2 --layers 4,8 --out maps.png"
        parser = add_command(inner, name, _maps, what, example)
        parser.add_argument("image", type=Path, metavar="IMAGE")
        parser.add_argument("--encoders", default="micro", help=f"comma-separated; {ENCODER}")
        parser.add_argument("--layers", default="", help="of every encoder, comma-separated; three of each by default")
        parser.add_argument("--weights", default="checkpoint", choices=("checkpoint", "random"), help=WEIGHTS)
        parser.add_argument("--out", type=Path, default=Path(f"{name}.png"), help=f"the picture ({name}.png)")
        if name == "simmap":
            parser.add_argument("--at", type=_point, required=True, metavar="X,Y", help="pixels of the image")


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no point; give two numbers as 120,80") from None
    return x, y


def _maps(options: argparse.Namespace) -> None:
    from ..app.probing import open_maps

    names = [name.strip() for name in options.encoders.split(",") if name.strip()]
    at = options.at if options.action == "simmap" else None
    print(open_maps(options.image, names, options.layers, options.out, at=at, weights=options.weights))


def _add_advise(inner: argparse._SubParsersAction) -> None:
    parser = add_command(
        inner, "advise", _advise, "a recipe from a probe's curves: encoders, layers, merge, with evidence and cost",
        "  commvlm probe advise runs/probe --tasks rec,presence --recipe advised.yaml\n  commvlm inspect advised.yaml\n"
        "  commvlm probe advise runs/probe --trained runs.json   (rank correlation with trained models)",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="a probe's folder")
    parser.add_argument(
        "--tasks", default="", help="that the model is for, comma-separated; all that were asked by default"
    )
    parser.add_argument("--head", default="mlp", choices=("linear", "mlp"), help="whose scores count (mlp)")
    parser.add_argument(
        "--extends", default="micro", help="the recipe whose data, language model and training are kept"
    )
    parser.add_argument(
        "--recipe", type=Path, help="where the recipe is written (OUT/advised.yaml); it is printed, too"
    )
    parser.add_argument("--trained", type=Path, help="scores of trained models, as JSON (see docs/probes.md)")


def _advise(options: argparse.Namespace) -> None:
    from ..app.probing import advise_recipe, compare_trained

    if options.trained is not None:
        for task, found in compare_trained(options.out, options.trained, head=options.head).items():
            value, low, high = found.interval
            print(f"{task}: rank correlation {value:.2f} [{low:.2f}, {high:.2f}] over {found.pairs} configurations")
        return
    tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    text = advise_recipe(options.out, tasks, head=options.head, extends=options.extends, recipe=options.recipe)
    print(text, end="")


def _add_features(inner: argparse._SubParsersAction) -> None:
    parser = add_command(
        inner, "features", _features,
        "a recipe's encoders on its training images, once, into a store that training reads; resumes",
        "  commvlm probe features micro --data.root world --out features --layers all\n"
        "  commvlm train micro --data.root world --out runs/first --train.features features\n" + OVERRIDES,
        overridable=True,
    )  # fmt: skip
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--out", type=Path, required=True, help="folder of the stores, one for each encoder")
    parser.add_argument("--layers", help="of every encoder, such as all; those that the recipe asks for by default")
    parser.add_argument("--kept", default="bf16", choices=("fp32", "bf16", "int8"), help="how values are kept (bf16)")
    parser.add_argument("--batch", type=count, default=32, help="images encoded at once (32)")


def _features(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    from ..train.features import store_recipe

    layers = [entry.strip() for entry in options.layers.split(",")] if options.layers else None
    stores = store_recipe(recipe, options.out, layers=layers, kept=options.kept, batch=options.batch)
    for store in stores.values():
        size = sum(shard.stat().st_size for shard in store.folder.glob("shard-*.safetensors"))
        print(f"{store.folder}: {len(store):,} images, layers {list(store.layers)}, {size / 1e6:,.1f} MB")
