"""dijiang-convert: gives any pretrained Transformer attention that costs O(1) per generated token.

Every verb of the command line is a function here: `dijiang_convert.convert("pythia-410m")`.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import DijiangError, Unsupported

if TYPE_CHECKING:
    from .benchmark import benchmark as benchmark
    from .convert import convert as convert
    from .demo import demo as demo
    from .evaluate import evaluate as evaluate
    from .finetune import finetune as finetune
    from .generate import generate as generate
    from .inspect import inspect as inspect
    from .push import push as push

__version__ = "0.2.0"

VERBS = ("convert", "finetune", "evaluate", "generate", "benchmark", "inspect", "push", "demo")
__all__ = ["DijiangError", "Unsupported", "__version__", *VERBS]


class _Package(ModuleType):
    """A verb's module and its function share their name: here the name is the function. Modules load when first
    asked for, so that importing the package costs nothing."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in VERBS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.{name}")
    return globals()[name]
