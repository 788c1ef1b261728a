"""What a generation did and what it cost, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def total_seconds(raw: Mapping[str, Any]) -> float:
    """All stages of `Session.stats()` together."""
    return float(sum(raw.get("seconds", {}).values()))


def _plain(value: Any) -> Any:
    """Numbers, lists and string-keyed dicts only, as JSON wants them."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


@dataclass(frozen=True)
class Tally:
    """How often something was done, and the time it took in seconds."""

    calls: int
    seconds: float

    @property
    def ms(self) -> float:
        """Mean time of one call, milliseconds."""
        return 1000.0 * self.seconds / self.calls if self.calls else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"calls": self.calls, "seconds": self.seconds, "ms": self.ms}


def _tallies(raw: Iterable[Mapping[str, Any]]) -> dict[int, Tally]:
    """Those that happened, by their index."""
    found = (Tally(int(t["calls"]), float(t["seconds"])) for t in raw)
    return {i: t for i, t in enumerate(found) if t.calls}


def plain_cost(raw: Mapping[str, Any]) -> float | None:
    """Mean seconds of a round of one row (plain decoding's), from `Session.stats()`; None when there was none."""
    tally = _tallies(raw.get("verify_by_width", ())).get(1)
    return tally.seconds / tally.calls if tally is not None else None


@dataclass(frozen=True)
class Stats:
    """Statistics of one generation, or of all those of a session. Times are in seconds unless they say ms.

    steps: verify rounds; the first token comes from the prefill and belongs to none of them.
    drafted, accepted: drafts verified and kept, whoever proposed them; proposed: slots the drafter computed.
    drafted_per_slot, accepted_per_slot: the drafter's, in slots 1, 2, ...
    left_out_tokens: committed while drafting was so far from paying that the drafter was not even told of them.
    lookup_drafted, lookup_accepted: prompt lookup's.
    depth_histogram: rounds by the number of drafts verified, from 0.
    seconds: time by stage: prefill, draft, verify, sample, ingest.
    verify_by_width: rounds by the rows of their target pass, the choice of tokens included.
    draft_by_count: drafter runs by the slots computed.
    experts_by_width: mean distinct experts that a MoE layer read, by rows.
    plain_round_seconds: mean time of a round of one row, from the whole session where this generation had none;
        None: never measured.
    prompt_seconds: time until the prompt was in, whichever stages it went to.
    seed: None for a session.
    more: whatever else the engine reports, unchanged.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    drafted: int
    accepted: int
    proposed: int
    drafted_per_slot: tuple[int, ...]
    accepted_per_slot: tuple[int, ...]
    left_out_tokens: int
    lookup_drafted: int
    lookup_accepted: int
    depth_histogram: tuple[int, ...]
    seconds: dict[str, float]
    verify_by_width: dict[int, Tally]
    draft_by_count: dict[int, Tally]
    experts_by_width: dict[int, float]
    plain_round_seconds: float | None
    prompt_seconds: float
    seed: int | None
    more: dict[str, Any]

    @classmethod
    def from_core(
        cls,
        raw: Mapping[str, Any],
        *,
        seed: int | None = None,
        generated_tokens: int | None = None,
        prompt_seconds: float = 0.0,
        plain_round_seconds: float | None = None,
    ) -> Stats:
        """From `Session.stats()` or `Session.session_stats()`.

        generated_tokens: tokens kept, which a stop string may have made fewer than the engine committed; None: those.
        plain_round_seconds: used when raw has no round of one row.
        """
        rest = dict(raw)
        committed = int(rest.pop("generated_tokens", 0))
        experts, calls = (rest.pop(k, ()) for k in ("experts_by_width", "expert_calls_by_width"))
        own = plain_cost(raw)
        return cls(
            prompt_tokens=int(rest.pop("prompt_tokens", 0)),
            cached_tokens=int(rest.pop("cached_tokens", 0)),
            generated_tokens=committed if generated_tokens is None else generated_tokens,
            steps=int(rest.pop("steps", 0)),
            drafted=int(rest.pop("drafted", 0)),
            accepted=int(rest.pop("accepted", 0)),
            proposed=int(rest.pop("proposed", 0)),
            drafted_per_slot=_ints(rest.pop("drafted_per_slot", ())),
            accepted_per_slot=_ints(rest.pop("accepted_per_slot", ())),
            left_out_tokens=int(rest.pop("left_out_tokens", 0)),
            lookup_drafted=int(rest.pop("lookup_drafted", 0)),
            lookup_accepted=int(rest.pop("lookup_accepted", 0)),
            depth_histogram=_ints(rest.pop("depth_histogram", ())),
            seconds={str(k): float(v) for k, v in rest.pop("seconds", {}).items()},
            verify_by_width=_tallies(rest.pop("verify_by_width", ())),
            draft_by_count=_tallies(rest.pop("draft_by_count", ())),
            experts_by_width={w: e / n for w, (e, n) in enumerate(zip(experts, calls, strict=True)) if n},
            plain_round_seconds=plain_round_seconds if own is None else own,
            prompt_seconds=prompt_seconds,
            seed=seed,
            more=_plain(rest),
        )

    @property
    def tokens_per_step(self) -> float:
        """Acceptance length: tokens committed by one verify round, the target's own included; 1 is plain decoding."""
        return (self.steps + self.accepted) / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of the drafts of slots 1, 2, ... that were accepted (their prefix with them)."""
        pairs = zip(self.accepted_per_slot, self.drafted_per_slot, strict=False)
        return tuple(a / d for a, d in pairs if d)

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts / drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def decode_seconds(self) -> float:
        """Time after the prompt was in."""
        return max(0.0, sum(self.seconds.values()) - self.prompt_seconds)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed (those in the cache excluded) per second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens committed by rounds, per second."""
        return (self.steps + self.accepted) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def plain_seconds(self) -> float | None:
        """What plain decoding would have taken after the prompt; None when no round of one row was measured.

        Tokens kept that rounds committed (the first came with the prompt) times the mean cost of a round of one row.
        """
        if self.plain_round_seconds is None:
            return None
        return max(0, min(self.generated_tokens - 1, self.steps + self.accepted)) * self.plain_round_seconds

    @property
    def speedup(self) -> float | None:
        """plain_seconds / decode_seconds: above 1, speculation paid; None when either is unknown."""
        plain = self.plain_seconds
        return plain / self.decode_seconds if plain is not None and self.decode_seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, derived numbers included, as plain JSON values; widths and counts are string keys."""
        derived = {
            "verify_by_width": {str(w): t.to_dict() for w, t in self.verify_by_width.items()},
            "draft_by_count": {str(n): t.to_dict() for n, t in self.draft_by_count.items()},
            "plain_seconds": self.plain_seconds,
            "speedup": self.speedup,
            "tokens_per_step": self.tokens_per_step,
            "acceptance": list(self.acceptance),
            "acceptance_rate": self.acceptance_rate,
            "decode_seconds": self.decode_seconds,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }
        return {**_plain(asdict(self)), **derived}

    def table(self, title: str = "statistics") -> Table:
        """A rich table for people."""
        table = Table(title=title, show_header=False)
        table.add_column(justify="left")
        table.add_column(justify="right")
        table.add_row("prompt", f"{self.prompt_tokens} tokens, {self.cached_tokens} from the cache")
        table.add_row("prefill", f"{self.prefill_tokens_per_s:.1f} tokens/s")
        table.add_row("generated", f"{self.generated_tokens} tokens")
        table.add_row("decode", f"{self.decode_tokens_per_s:.1f} tokens/s")
        table.add_row("verify steps", f"{self.steps}")
        table.add_row("tokens per step", f"{self.tokens_per_step:.2f}")
        if self.drafted:
            table.add_row("drafts accepted", f"{self.accepted} of {self.drafted} ({self.acceptance_rate:.0%})")
            slots = zip(self.accepted_per_slot, self.drafted_per_slot, strict=True)
            by_slot = [f"{i}: {a}/{d} ({a / d:.0%})" for i, (a, d) in enumerate(slots, 1) if d]
            _add_grid(table, "acceptance by slot", by_slot)
            if self.lookup_drafted:
                table.add_row("of them by lookup", f"{self.lookup_accepted} of {self.lookup_drafted}")
            by_depth = [f"{n}: {count}" for n, count in enumerate(self.depth_histogram) if count]
            _add_grid(table, "rounds by depth", by_depth)
        for stage, seconds in self.seconds.items():
            table.add_row(f"time: {stage}", f"{seconds * 1000:.1f} ms")
        _add_grid(table, "round of w rows", [f"{w}: {t.ms:.2f} ms" for w, t in self.verify_by_width.items()])
        _add_grid(table, "draft of n slots", [f"{n}: {t.ms:.2f} ms" for n, t in self.draft_by_count.items()])
        _add_grid(table, "experts a layer, w rows", [f"{w}: {e:.1f}" for w, e in self.experts_by_width.items()])
        if self.plain_seconds is not None and self.speedup is not None:
            times = f"{self.plain_seconds * 1000:.1f} ms; this took {self.decode_seconds * 1000:.1f} ms"
            table.add_row("plain would take", f"{times} ({self.speedup:.2f}x)")
        elif self.steps:
            table.add_row("plain would take", "not measured: no round of one row")
        if self.seed is not None:
            table.add_row("seed", str(self.seed))
        return table


def _add_grid(table: Table, name: str, items: Sequence[str], per_line: int = 4) -> None:
    """A row of many short items, so many a line; nothing when there are none."""
    if items:
        lines = [items[i : i + per_line] for i in range(0, len(items), per_line)]
        table.add_row(name, "\n".join("  ".join(line) for line in lines))


def format_acceptance(acceptance: Iterable[float], slots: int = 8) -> str:
    """Acceptance of the first slots as percentages."""
    return "  ".join(f"{a:.0%}" for a in list(acceptance)[:slots]) or "-"
