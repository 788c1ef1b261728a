"""What a generation did and what it cost, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
class Stats:
    """Statistics of one generation. Times are in seconds.

    steps: verify rounds; the first token comes from the prefill and belongs to none of them.
    drafted_per_slot, accepted_per_slot: drafts proposed and kept in slots 1, 2, ...
    depth_histogram: rounds by the number of drafts verified, from 0.
    seconds: time by stage: prefill, draft, verify, sample, ingest.
    prompt_seconds: time until the prompt was in, whichever stages it went to.
    more: whatever else the engine reports, unchanged.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    drafted: int
    accepted: int
    drafted_per_slot: tuple[int, ...]
    accepted_per_slot: tuple[int, ...]
    depth_histogram: tuple[int, ...]
    seconds: dict[str, float]
    prompt_seconds: float
    seed: int
    more: dict[str, Any]

    @classmethod
    def from_core(
        cls, raw: Mapping[str, Any], *, seed: int, generated_tokens: int, prompt_seconds: float = 0.0
    ) -> Stats:
        """From `Session.stats()`.

        generated_tokens: tokens kept, which a stop string may have made fewer than the engine committed.
        """
        rest = dict(raw)
        rest.pop("generated_tokens", None)
        return cls(
            prompt_tokens=int(rest.pop("prompt_tokens", 0)),
            cached_tokens=int(rest.pop("cached_tokens", 0)),
            generated_tokens=generated_tokens,
            steps=int(rest.pop("steps", 0)),
            drafted=int(rest.pop("drafted", 0)),
            accepted=int(rest.pop("accepted", 0)),
            drafted_per_slot=_ints(rest.pop("drafted_per_slot", ())),
            accepted_per_slot=_ints(rest.pop("accepted_per_slot", ())),
            depth_histogram=_ints(rest.pop("depth_histogram", ())),
            seconds={str(k): float(v) for k, v in rest.pop("seconds", {}).items()},
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

    def to_dict(self) -> dict[str, Any]:
        """Everything, derived numbers included, as plain JSON values."""
        derived = {
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
            table.add_row("acceptance by slot", format_acceptance(self.acceptance))
            used = [f"{n}: {count}" for n, count in enumerate(self.depth_histogram) if count]
            table.add_row("rounds by depth", "  ".join(used))
        for stage, seconds in self.seconds.items():
            table.add_row(f"time: {stage}", f"{seconds * 1000:.1f} ms")
        table.add_row("seed", str(self.seed))
        return table


def format_acceptance(acceptance: Iterable[float], slots: int = 8) -> str:
    """Acceptance of the first slots as percentages."""
    return "  ".join(f"{a:.0%}" for a in list(acceptance)[:slots]) or "-"
