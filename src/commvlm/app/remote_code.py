"""The model room's own modules, laid beside a checkpoint's weights, so that transformers can load it without this package.

No second copy is kept by hand: the modules that `modeling.py`, `config.py` and `processing.py` import are copied as they
are, but for a head that says where they are from and two things that transformers' loader asks for:

- it finds files by lines `from .name import ...`; where a module is imported as a whole, such a line is put in front;
- it refuses code that names a package which is not installed, wherever that stands; timm, which only timm's encoders need,
  is imported by name instead.
"""

from __future__ import annotations

import ast
import re
from importlib import resources
from importlib.metadata import version
from pathlib import Path

MODULES = {
    "AutoConfig": "config.CommConfig",
    "AutoModel": "modeling.CommModel",
    "AutoModelForImageTextToText": "modeling.CommForConditionalGeneration",
    "AutoImageProcessor": "processing.CommImageProcessor",
    "AutoProcessor": "processing.CommProcessor",
}
"""What stands as auto_map beside the weights."""
OPTIONAL = ("timm",)
"""Packages that only some encoders need."""


def write_code(folder: Path) -> list[Path]:
    """Writes the modules into the folder. -> their files."""
    written = []
    for name, text in bundle().items():
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def bundle() -> dict[str, str]:
    """Name -> text of every module that the model's classes need, each importing none but these and installed packages."""
    texts: dict[str, str] = {}
    waiting = sorted({place.split(".")[0] for place in MODULES.values()})
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        source = resources.files("commvlm").joinpath("model", f"{name}.py").read_text(encoding="utf-8")
        texts[name] = _loadable(source, name)
        waiting += _neighbours(source, name)
    return dict(sorted(texts.items()))


def _neighbours(source: str, name: str) -> list[str]:
    """The modules of the same room that a module imports. Any other import of ours could not be resolved: ValueError."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or (node.module and "." in node.module):
                raise ValueError(f"model/{name}.py imports {'.' * node.level}{node.module}, which is no neighbour")
            found += [node.module] if node.module else [alias.name for alias in node.names]
    return found


def _loadable(source: str, name: str) -> str:
    text = re.sub(
        r"^from \. import (\w+)( as \w+)?$",
        r"from .\1 import __doc__ as _  # by this line transformers finds the file\n\g<0>",
        source,
        flags=re.MULTILINE,
    )
    for package in OPTIONAL:
        text = re.sub(
            rf"^(\s+)import {package}\b.*$", rf'\1{package} = __import__("{package}")', text, flags=re.MULTILINE
        )
    head = f"# commvlm {version('commvlm')}, src/commvlm/model/{name}.py (Apache-2.0), copied by `commvlm export`.\n"
    return head + text
