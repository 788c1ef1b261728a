"""MiniMax-M2.7 with a DFlash block drafter: exact speculative decoding from GGUF files.

import dflash_cpp

engine = dflash_cpp.Engine("target.gguf", drafter="drafter.gguf")
print(engine.generate("def quicksort(", max_tokens=128).text)
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from typing import Any

    from ._core import __version__
    from .api import Engine, Generation, Piece, Stream, generate
    from .errors import CapacityError, DFlashError
    from .options import EngineOptions, GenerateOptions
    from .stats import Stats

__all__ = [
    "CapacityError",
    "DFlashError",
    "Engine",
    "EngineOptions",
    "GenerateOptions",
    "Generation",
    "Piece",
    "Stats",
    "Stream",
    "__version__",
    "generate",
]

_MODULES = {
    "_core": ("__version__",),
    "api": ("Engine", "Generation", "Piece", "Stream", "generate"),
    "errors": ("CapacityError", "DFlashError"),
    "options": ("EngineOptions", "GenerateOptions"),
    "stats": ("Stats",),
}


def __getattr__(name: str) -> Any:
    """Imports a public name, or its module, when it is first used: the command line is there to take a Ctrl-C then."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f".{name}", __name__)
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
