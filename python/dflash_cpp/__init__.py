"""MiniMax-M2.7 with a DFlash block drafter: exact speculative decoding from GGUF files.

import dflash_cpp

engine = dflash_cpp.Engine("target.gguf", drafter="drafter.gguf")
print(engine.generate("def quicksort(", max_tokens=128).text)
"""

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
