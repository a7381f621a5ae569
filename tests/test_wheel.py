"""The wheel: the package and its data, nothing else, at work where the checkout is not."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = {".py", ".json", ".jinja", ".safetensors", ".html", ".yaml", ".md", ".typed"}

INSTALLED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import commvlm
assert commvlm.__file__.startswith(sys.path[0]), commvlm.__file__
from commvlm.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", folder / "copy" / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy" / name)
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", "out", "./copy")
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=folder, check=True, timeout=250)
    (found,) = (folder / "out").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(site: Path, cwd: Path, *argv: str) -> str:
    """`commvlm ARGV` of the unpacked wheel, in an isolated interpreter and another folder."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", INSTALLED, str(site), *argv],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_it_holds_the_package_with_its_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    info = f"{wheel.name.rsplit('-', 3)[0]}.dist-info/"
    held = {name for name in names if not name.startswith(info)}
    package = ROOT / "src"
    files = {path.relative_to(package).as_posix() for path in (package / "commvlm").rglob("*") if path.is_file()}
    assert held == {name for name in files if "__pycache__" not in name}
    assert {Path(name).suffix for name in held} <= DATA
    assert {name.removeprefix(info) for name in names if name.startswith(info)} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE",
    }  # fmt: skip
    assert "commvlm/recipes/peers/llava-1.5-7b.yaml" in held
    assert "commvlm/microworld/weights/clip/model.safetensors" in held


@pytest.mark.slow
def test_its_entry_points_lead_somewhere(site):
    (place,) = site.glob("*.dist-info/entry_points.txt")
    points = configparser.ConfigParser()
    points.optionxform = str  # type: ignore[assignment,method-assign]
    points.read(place)
    assert set(points.sections()) == {"console_scripts", "lmms_eval.models", "vllm.general_plugins"}
    for section in points.sections():
        for _, target in points.items(section):
            module, name = target.split(":")
            place = site / Path(*module.split("."))
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            assert f"def {name}(" in file.read_text()


@pytest.mark.slow
def test_it_works_outside_the_checkout(site, tmp_path):
    assert "commvlm" in run(site, tmp_path, "--version")
    recipes = run(site, tmp_path, "recipes")
    assert "micro" in recipes
    assert "peers/llava-1.5-7b" in recipes
    assert "comm-7b" in recipes
    run(site, tmp_path, "microworld", "write", "world", "--train", "12", "--test", "4")
    stages = '[{"name": "only", "steps": 1, "batch": 1, "trains": {"project": 1.0e-3}}]'
    said = run(
        site, tmp_path, "train", "micro", "--out", "run", "--data.root", "world", "--data.group", "2",
        "--train.stages", stages,
    )  # fmt: skip
    assert "run/model" in said
    run(site, tmp_path, "export", "run", "exported")
    assert (tmp_path / "exported" / "modeling.py").is_file()
    assert not list(tmp_path.rglob("*.part"))
