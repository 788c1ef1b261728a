"""dflash-cpp convert"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from ..errors import DFlashError
from . import common

_EXAMPLES = """\
  dflash-cpp convert MiniMax-M2.7-AWQ-4bit -o m2.gguf
  dflash-cpp convert MiniMax-M2.7-DFlash --target-model MiniMax-M2.7-AWQ-4bit -o m2-dflash.gguf"""


def converter() -> Any:
    """The installed converter's command line. Raises DFlashError where it is not installed."""
    try:
        return importlib.import_module("dflash_cpp.convert.convert_awq_to_gguf")
    except ModuleNotFoundError as e:
        if e.name is None or not e.name.startswith("dflash_cpp.convert"):
            raise
        raise DFlashError(
            "convert: the converter is not installed with this package; run convert/convert_awq_to_gguf.py, "
            "or install with pip install ."
        ) from e


def add(subparsers: common.Subparsers) -> None:
    """Declares the command; the converter declares its own arguments."""
    parser = common.add_command(subparsers, "convert", run, "checkpoint folder to GGUF file", _EXAMPLES)
    try:
        converter().add_arguments(parser)
    except DFlashError:
        # `--help` of the other commands must work without it; run() says what is missing
        parser.add_argument("arguments", nargs="*")


def run(args: argparse.Namespace) -> int:
    """Converts; 0, 2 for wrong input (the converter has said what), 130 when interrupted."""
    status = int(converter().run(args, "dflash-cpp"))
    return 2 if status == 1 else status
