"""Compares two results of `dflash-cpp bench --json`: speed row by row, and whether it differs beyond the spread.

python bench/compare.py before.json after.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def read(path: str) -> dict[str, Any]:
    """One result. Raises SystemExit with a message for anything else."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SystemExit(f"compare: {path}: expected the JSON of dflash-cpp bench: {e}") from e
    if not isinstance(result, dict) or result.get("kind") != "dflash-cpp bench":
        raise SystemExit(f"compare: {path}: expected the JSON of dflash-cpp bench --json, found something else")
    return result


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows present in both: what, before, after, ratio, verdict ("faster", "slower", "same": quartiles overlap)."""

    def rows(result: dict[str, Any]) -> dict[str, dict[str, float]]:
        out = {f"prefill, context {r['context']}": r["tokens_per_s"] for r in result["prefill"]}
        for r in result["decode"]:
            depth = "plain" if r["depth"] == 0 else f"depth {r['depth']}"
            out[f"decode, context {r['context']}, {depth}"] = r["tokens_per_s"]
        return out

    before, after = rows(a), rows(b)
    out = []
    for what in (w for w in before if w in after):
        x, y = before[what], after[what]
        verdict = "faster" if y["low"] > x["high"] else "slower" if y["high"] < x["low"] else "same"
        ratio = y["median"] / x["median"]
        out.append({"what": what, "before": x["median"], "after": y["median"], "ratio": ratio, "verdict": verdict})
    return out


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else differs between the two runs, so that the ratio means something else."""
    names = ("version", "backend", "n_threads", "model", "drafter", "options")
    return [name for name in names if a.get(name) != b.get(name)]


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 0, or 1 when something is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    args = parser.parse_args(argv)
    a, b = read(args.before), read(args.after)
    rows = compare(a, b)
    if not rows:
        raise SystemExit("compare: the two results have no row in common")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "before", "after", "ratio", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for r in rows:
        table.add_row(r["what"], f"{r['before']:.1f}", f"{r['after']:.1f}", f"{r['ratio']:.3f}", r["verdict"])
    console = Console(highlight=False)
    console.print(table)
    changed = differences(a, b)
    if changed:
        console.print(f"note: the runs differ in {', '.join(changed)}")
    return 1 if any(r["verdict"] == "slower" for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
