"""data: what a recipe is trained and evaluated on, checked, prepared, downloaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .command import OVERRIDES, RECIPE, add_command, count, recipe_of


def add_data(commands: argparse._SubParsersAction) -> None:
    what = "a recipe's data: check it, prepare it once, list and fetch what it needs"
    example = (
        "  commvlm data check recipes/micro.yaml --data.root world --out data-check\n"
        "  commvlm data prepare comm-7b --data.root data\n"
        "  commvlm data download coco-val2014 --to data"
    )
    group = add_command(commands, "data", lambda options: None, what, example, overridable=True)
    inner = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = add_command(
        inner, "check", _check,
        "read every source, decode every image, look at every box: a table, check.json and check.html",
        "  commvlm microworld write world\n  commvlm data check micro --data.root world\n"
        "  commvlm data check comm-7b --data.root data --images 2000\n" + OVERRIDES,
        overridable=True,
    )  # fmt: skip
    check.add_argument("recipe", help=RECIPE)
    check.add_argument("--out", type=Path, default=Path("data-check"), help="folder of check.json and check.html")
    check.add_argument("--images", type=count, help="images of a source that are opened; all by default")
    check.add_argument("--workers", type=count, help="images decoded at once; one a core by default")
    check.add_argument("--json", action="store_true", help="JSON on stdout")
    prepare = add_command(
        inner, "prepare", _prepare,
        "turn the sources into indexed stores under data.root, once; finished ones are kept, so it resumes",
        "  commvlm data prepare comm-7b --data.root data\n  commvlm data prepare comm-7b --sources rec,gc\n" + OVERRIDES,
        overridable=True,
    )  # fmt: skip
    prepare.add_argument("recipe", help=RECIPE)
    prepare.add_argument("--sources", default="", help="comma-separated; all by default")
    download = add_command(
        inner, "download", _download,
        "list what the sources need, from where, licence, size; or fetch what has a direct link",
        "  commvlm data download\n  commvlm data download coco-annotations pope-random-2910 --to data",
    )  # fmt: skip
    download.add_argument("items", nargs="*", metavar="ITEM", help="what to fetch; without any, the list is printed")
    download.add_argument("--to", type=Path, default=Path("data"), help="the folder that data.root will name")
    download.add_argument("--json", action="store_true", help="the list as JSON on stdout")


def _check(options: argparse.Namespace) -> int:
    recipe = recipe_of(options)
    from ..app.datacheck import print_check, write_check
    from ..train.checking import check_recipe

    found = check_recipe(recipe, images=options.images, workers=options.workers)
    page = write_check(found, options.out, recipe=recipe.name)
    checks = [item.check for item in found]
    if options.json:
        print(json.dumps([check.as_json() for check in checks], indent=1, ensure_ascii=False))
    else:
        print_check(checks)
        print(f"the page is {page}")
    return 2 if any(check.error for check in checks) else 0


def _prepare(options: argparse.Namespace) -> None:
    recipe = recipe_of(options)
    from ..train.checking import prepare_recipe

    names = [name.strip() for name in options.sources.split(",") if name.strip()]
    for source, stored in prepare_recipe(recipe, names):
        skipped = stored.meta["skipped"]["count"]
        said = f", {skipped:,} entries left out" if skipped else ""
        print(f"{source.name}: {len(stored):,} examples{said} in {stored.folder}")


def _download(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from ..data.downloads import ITEMS, fetch, item_named

    if not options.items:
        print(json.dumps([asdict(item) for item in ITEMS], indent=1) if options.json else _listed(ITEMS))
        return
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    for item in [item_named(name) for name in options.items]:
        with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(), transient=True) as bars:
            bar = bars.add_task(item.name, total=None)
            folder = fetch(item, options.to, lambda came, size: bars.update(bar, advance=came, total=size))  # noqa: B023
        print(f"{item.name} is in {folder}")


def _listed(items: tuple) -> str:
    """The list for people: two lines an item."""
    lines = []
    for item in items:
        size = f"{item.size / 1e9:.2f} GB" if isinstance(item.size, int) else item.size
        checked = "SHA-256 known" if item.sha256 else "SHA-256 kept on first fetch" if item.direct else "by hand"
        lines += [
            f"{item.name:<24}{size:>12}  {checked:<28}{item.licence}",
            f"    {item.url} -> {item.folder}/  for {item.for_}",
        ]
    return "\n".join(lines)
