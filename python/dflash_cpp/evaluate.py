"""The acceptance table of a drafter: how long the leading run of its greedy drafts agrees with held-out text.

The greedy proxy of drafter training (m_accept, k cumulative): at an anchor inside a sequence that the target wrote, one
block is drafted from everything before it and compared with what follows. On the target's own greedy text it equals
greedy verification. The target runs once over each sequence; blocks are drafted from the last anchor to the first, so
that each costs one drafter run (a session keeps the prefix that its cache shares with a request).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from . import _core
from .corpus import Sample
from .errors import CapacityError, DFlashError
from .options import MAX_SEED

K_REPORTED: Final = 8
PUBLISHED_SEED: Final = 5  # of the anchors behind the published table, see docs/speculation.md
BATCH: Final = 32  # sequences whose anchors are drawn by one call there
PIECE: Final = 512  # tokens taken in by one call at most: Ctrl-C is heard between calls


@dataclass(frozen=True)
class Evaluation:
    """The table, and the blocks behind it.

    hits: bool [blocks, slots], whether the top-1 draft of each slot is the sequence's own token.
    losses: float [blocks, slots], -log of the probability the drafter gave that token, nats.
    sequence: int [blocks], the index of the sequence a block is from. anchors: int [blocks], the anchor's position.
    left_out: sequences without room for a block.
    """

    hits: NDArray[np.bool_]
    losses: NDArray[np.float64]
    sequence: NDArray[np.int64]
    anchors: NDArray[np.int64]
    left_out: int = 0

    @property
    def blocks(self) -> int:
        """Blocks drafted."""
        return len(self.hits)

    @property
    def runs(self) -> NDArray[np.int64]:
        """Leading hits of each block, [blocks]."""
        runs: NDArray[np.int64] = np.cumprod(self.hits, axis=1).sum(axis=1)
        return runs

    @property
    def m_accept(self) -> float:
        """Mean leading run: tokens a step, the target's own not counted (a step commits m_accept + 1)."""
        return float(self.runs.mean())

    @property
    def cumulative(self) -> tuple[float, ...]:
        """Share of blocks whose slots 1..n all hit, for n = 1, 2, ..."""
        return tuple(float(x) for x in np.cumprod(self.hits, axis=1).mean(axis=0))

    @property
    def val_loss(self) -> float:
        """Mean cross entropy over all slots, unweighted, nats."""
        return float(self.losses.mean())

    @property
    def m_accept_error(self) -> float:
        """Standard error of m_accept: sequences are the independent units, the blocks of one are not."""
        means = np.array([self.runs[self.sequence == s].mean() for s in np.unique(self.sequence)])
        return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """m_accept, k1..k8, val_loss, blocks and a few more, as plain JSON values."""
        shares = {f"k{n}": share for n, share in enumerate(self.cumulative[:K_REPORTED], 1)}
        error = self.m_accept_error
        return {
            "m_accept": self.m_accept,
            **shares,
            "val_loss": self.val_loss,
            "blocks": self.blocks,
            "sequences": len(np.unique(self.sequence)),
            "sequences_left_out": self.left_out,
            "m_accept_standard_error": None if np.isnan(error) else error,
            "k_cumulative": list(self.cumulative),
        }

    def table(self, title: str = "acceptance") -> Table:
        """A rich table for people."""
        error = self.m_accept_error
        notes = [] if np.isnan(error) else [f"m_accept ± {error:.3f} (standard error over sequences)"]
        if self.left_out:
            notes.append(f"sequences without room for a block, left out: {self.left_out}")
        # Without padding and edges it fits the 80 columns of a pipe.
        caption = "\n".join(notes) or None
        out = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        shown = self.cumulative[:K_REPORTED]
        for name in ("m_accept", *(f"k={n}" for n in range(1, len(shown) + 1)), "val_loss", "blocks"):
            out.add_column(name, justify="right", no_wrap=True)
        out.add_row(f"{self.m_accept:.3f}", *(f"{x:.1%}" for x in shown), f"{self.val_loss:.3f}", str(self.blocks))
        return out


def philox(seed: int, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10, a counter-based random generator (Salmon et al., 2011).

    seed: the key, 64 bits. counters: [n, 4], words below 2**32. Returns 4 random words for each, [n, 4].
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    key0, key1 = seed & low, seed >> 32
    for _ in range(10):
        x, y = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (y >> 32) ^ c1 ^ key0, y & low, (x >> 32) ^ c3 ^ key1, x & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return np.stack([c0, c1, c2, c3], axis=1)


def draw_anchors(eligible: Sequence[NDArray[np.int64]], anchors: int, seed: int) -> list[NDArray[np.int64]]:
    """Anchors of each sequence, ascending: `anchors` of its eligible positions, drawn with replacement.

    All of them once where there are no more than `anchors`. These are the draws of torch.randint on a CUDA device with
    a generator of that seed, called once for every BATCH sequences, as in the evaluation whose table is published:
    element j of call b is the first word of Philox at counter (b, 0, j, 0), modulo the size of the range.
    """
    chosen = []
    for s, positions in enumerate(eligible):
        if len(positions) <= anchors:
            chosen.append(positions)
            continue
        counters = np.zeros((anchors, 4), dtype=np.uint64)
        counters[:, 0] = s // BATCH
        counters[:, 2] = s % BATCH * anchors + np.arange(anchors)
        chosen.append(np.sort(positions[philox(seed, counters)[:, 0] % len(positions)]))
    return chosen


def eligible_anchors(sample: Sample, *, slots: int, anchor_range: tuple[int, int] | None) -> NDArray[np.int64]:
    """Positions of anchor_range (both ends included; None: all but the first) with a whole block behind them and,
    where the sample has a loss mask, with the anchor and its successor in it.
    """
    last = len(sample.tokens) - 1 - slots
    low, high = anchor_range if anchor_range is not None else (1, last)
    eligible = np.arange(max(low, 1), min(high, last) + 1)
    if sample.loss_mask is not None:
        eligible = eligible[sample.loss_mask[eligible] & sample.loss_mask[eligible + 1]]
    return eligible


def check_anchors(anchors: int, anchor_range: tuple[int, int] | None, seed: int) -> None:
    """Raises DFlashError for values that `evaluate` does not take, whatever the drafter and the data."""
    if anchors < 1:
        raise DFlashError(f"anchors: expected a number of at least 1, found {anchors}")
    if not 0 <= seed <= MAX_SEED:
        raise DFlashError(f"seed: expected a number in 0..{MAX_SEED}, found {seed}")
    if anchor_range is not None and not 1 <= anchor_range[0] <= anchor_range[1]:
        raise DFlashError(f"anchor range: expected 1 <= first <= last, found {anchor_range[0]}:{anchor_range[1]}")


def evaluate(
    session: _core.Session,
    block_size: int,
    samples: Sequence[Sample],
    *,
    anchors: int = 6,
    anchor_range: tuple[int, int] | None = None,
    seed: int = PUBLISHED_SEED,
    block_rows: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates a drafter on held-out sequences.

    session: of a model with a drafter of block_size rows; its timeline is replaced.
    anchors: blocks a sequence. anchor_range: first and last anchor position. seed: of `draw_anchors`.
    block_rows: rows the drafter runs, 2..block_size (None: the whole block, as in training); slots = rows - 1.
    on_progress: called with (sequences done, all) after each one.
    Sequences without room for a block are left out. Raises DFlashError where all are, and for logits that are no
    numbers; CapacityError for sequences longer than the context.
    """
    rows = block_size if block_rows is None else block_rows
    if not 2 <= rows <= block_size:
        raise DFlashError(f"block_rows: expected a number in 2..{block_size} (the drafter's block), found {rows}")
    check_anchors(anchors, anchor_range, seed)
    slots = rows - 1
    eligible = [eligible_anchors(s, slots=block_size - 1, anchor_range=anchor_range) for s in samples]
    if not any(len(e) for e in eligible):
        where = "" if anchor_range is None else f" in {anchor_range[0]}..{anchor_range[1]}"
        raise DFlashError(
            f"{samples[0].name if samples else 'samples'}: expected room for an anchor{where} and a block of "
            f"{block_size - 1} tokens after it (in the loss mask, where there is one), found none in any of "
            f"{len(samples)} sequences"
        )
    chosen = draw_anchors(eligible, anchors, seed)  # of all sequences, before any work
    for sample, positions in zip(samples, chosen, strict=True):
        if len(positions) and positions[-1] > session.n_ctx:
            raise CapacityError(f"{sample.name}: expected at most n_ctx = {session.n_ctx} tokens before an anchor, "
                                f"found {positions[-1]}; use a larger n_ctx")  # fmt: skip
    hits: list[NDArray[np.bool_]] = []
    losses: list[NDArray[np.float64]] = []
    for done, (sample, positions) in enumerate(zip(samples, chosen, strict=True), 1):
        for end in range(PIECE, int(positions.max(initial=0)), PIECE):
            session.draft_logits(sample.tokens[:end], int(sample.tokens[end]), slots, rows)
        for p in positions[::-1]:
            logits = session.draft_logits(sample.tokens[:p], int(sample.tokens[p]), slots, rows)
            own = sample.tokens[p + 1 : p + rows]
            hits.append(logits.argmax(axis=1) == own)
            losses.append(cross_entropy(logits, own))
            if not np.isfinite(losses[-1]).all():
                raise DFlashError(f"{sample.name}: the drafter's logits at position {p} are no finite numbers")
        if on_progress is not None:
            on_progress(done, len(samples))
    return Evaluation(
        hits=np.array(hits),
        losses=np.array(losses),
        sequence=np.repeat(np.arange(len(samples)), [len(c) for c in chosen]),
        anchors=np.concatenate([c[::-1] for c in chosen]),
        left_out=sum(len(c) == 0 for c in chosen),
    )


def cross_entropy(logits: NDArray[np.float32], labels: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """-log softmax(logits)[label] of each row, nats. logits [n, n_vocab], labels [n]."""
    x = logits.astype(np.float64)
    top = x.max(axis=1)
    result: NDArray[np.float64] = np.log(np.exp(x - top[:, None]).sum(axis=1)) + top - x[np.arange(len(x)), labels]
    return result
