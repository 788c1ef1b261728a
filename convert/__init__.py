"""AWQ int4 safetensors -> GGUF, for MiniMax-M2 targets and their DFlash drafters.

Installed as `dflash_cpp.convert`; in a checkout also `python convert/convert_awq_to_gguf.py`. Needs numpy, gguf and
rich, not the built extension.
"""

from __future__ import annotations

from .api import ConvertReport, convert
from .errors import ConvertError
from .progress import ConvertProgress

__all__ = ["ConvertError", "ConvertProgress", "ConvertReport", "convert"]
