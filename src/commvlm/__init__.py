"""COMM: several frozen vision encoders, several layers each, merged, aligned, concatenated, projected, read by an LLM.

Importing this package makes transformers' Auto classes know the model. transformers takes seconds to import, so that
happens when it is imported, before or after: `commvlm --help` does not wait for it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import CommConfig, CommForConditionalGeneration, CommProcessor

__version__ = version("commvlm")
__all__ = ["CommConfig", "CommForConditionalGeneration", "CommProcessor", "__version__"]


def _register() -> None:
    importlib.import_module(".model", __name__)  # registers at its end, also when its own import got here


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Registers the model as soon as transformers has been imported, and is gone then."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import model

    return getattr(model, name)
