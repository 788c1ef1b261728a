"""Pictures of a benchmark. Needs matplotlib (the optional extra `plot`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from .benchmark import break_even
from .errors import DFlashError

# Okabe and Ito's colours: told apart by everyone.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_FEWEST_CALLS: Final = 5  # of a width, to be drawn
_LINES: Final = (_BLUE, _GREEN, "#CC79A7", "#E69F00")


def need_matplotlib() -> Any:
    """matplotlib.figure. Raises DFlashError with the way to install it."""
    try:
        import matplotlib.figure
    except ImportError as e:
        raise DFlashError("plot: matplotlib is not installed; pip install 'dflash-cpp[plot]'") from e
    return matplotlib.figure


def plot_bench(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws `Benchmark.run`'s numbers into a PNG (or what the suffix says): speed by depth, acceptance, costs."""
    figure = need_matplotlib().Figure(figsize=(15, 4.8), layout="constrained")
    speed, accept, cost = figure.subplots(1, 3)
    _speed(speed, result)
    _acceptance(accept, result)
    _cost(cost, result)
    names = [(result[key] or {}).get("name") for key in ("model", "drafter")]
    title = f"{' + '.join(n for n in names if n) or 'synthetic'}, {result['backend']}"
    figure.suptitle(title, fontsize=10, color=_GREY)
    final = Path(path)
    partial = final.with_name(f".{final.stem}.partial{final.suffix or '.png'}")
    try:
        figure.savefig(partial, dpi=130)
        partial.replace(final)
    except (OSError, ValueError) as e:
        raise DFlashError(f"plot: {final} cannot be written: {e}") from e
    finally:
        partial.unlink(missing_ok=True)


def _clean(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _speed(axes: Any, result: dict[str, Any]) -> None:
    contexts = sorted({row["context"] for row in result["decode"]})
    for colour, context in zip(_LINES, contexts, strict=False):
        rows = [r for r in result["decode"] if r["context"] == context]
        fixed = sorted((r for r in rows if r["depth"] != "auto"), key=lambda r: r["depth"])
        x = [r["depth"] for r in fixed]
        y = [r["tokens_per_s"]["median"] for r in fixed]
        low = [r["tokens_per_s"]["median"] - r["tokens_per_s"]["low"] for r in fixed]
        high = [r["tokens_per_s"]["high"] - r["tokens_per_s"]["median"] for r in fixed]
        axes.errorbar(x, y, yerr=[low, high], color=colour, marker="o", capsize=2, label=f"fixed, context {context}")
        axes.axhline(y[0], color=colour, linestyle=":", linewidth=1)
        last = max(x)
        axes.annotate("plain = break-even", (last, y[0]), (0, -11), textcoords="offset points", ha="right",
                      fontsize=8, color=colour)  # fmt: skip
        for auto in (r for r in rows if r["depth"] == "auto"):
            value = auto["tokens_per_s"]
            axes.axhline(value["median"], color=colour, linewidth=1.4, linestyle="--")
            axes.axhspan(value["low"], value["high"], color=colour, alpha=0.12, linewidth=0)
            axes.annotate(f"auto {auto['ratio']['median']:.2f}x", (last, value["median"]), (0, 4),
                          textcoords="offset points", ha="right", fontsize=9, color=colour, weight="bold")  # fmt: skip
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.08)
    axes.set_xticks([0, 1, 2, 3, 4, 7, 15] if max(x) > 7 else range(max(x) + 1))
    axes.legend(frameon=False, fontsize=8)
    _clean(axes, "speed by depth", "drafts a round (0: plain decoding)", "tokens/s")


def _acceptance(axes: Any, result: dict[str, Any]) -> None:
    shares = result["acceptance_by_slot"]
    slots = range(1, len(shares) + 1)
    axes.bar(slots, [100 * s for s in shares], color=_BLUE, width=0.7)
    for slot, share in zip(slots, shares, strict=True):
        axes.annotate(f"{100 * share:.0f}", (slot, 100 * share), (0, 2), textcoords="offset points", ha="center",
                      fontsize=8, color=_GREY)  # fmt: skip
    axes.set_xticks(list(slots))
    axes.set_ylim(0, 105)
    _clean(axes, "acceptance by slot", "slot", "blocks whose slots up to here all stood, %")


def _cost(axes: Any, result: dict[str, Any]) -> None:
    rows = [r for r in result["verify_cost"] if r["relative"] is not None and r["calls"] >= _FEWEST_CALLS]
    x = [r["width"] for r in rows]
    axes.plot(x, [r["relative"] for r in rows], color=_BLUE, marker="o", label="measured")
    counted = [r for r in rows if r["bytes_relative"] is not None]
    if counted:
        label = "byte model (distinct experts counted)"
        axes.plot([r["width"] for r in counted], [r["bytes_relative"] for r in counted], color=_ORANGE,
                  marker="s", linestyle="--", label=label)  # fmt: skip
    shown = set(x)
    even = [e for e in break_even(result) if e["depth"] + 1 in shown]
    if even:
        axes.plot([e["depth"] + 1 for e in even], [e["m_accept"] + 1.0 for e in even], color=_GREEN, marker="^",
                  linewidth=1, label="with the draft: tokens a step needed")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _clean(axes, "cost of a pass", "rows (anchor + drafts)", "relative to plain decoding")
