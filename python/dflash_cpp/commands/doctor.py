"""dflash-cpp doctor"""

from __future__ import annotations

import argparse

from .. import doctor
from . import common

_EXAMPLES = """\
  dflash-cpp doctor
  dflash-cpp doctor --json"""


def add(subparsers: common.Subparsers) -> None:
    """Declares the command."""
    parser = common.add_command(subparsers, "doctor", run, "say what this machine and this build offer", _EXAMPLES)
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0."""
    report = doctor.examine()
    if args.json:
        common.print_json(report.to_dict())
    else:
        common.stdout_console().print(doctor.render(report))
    return 0
