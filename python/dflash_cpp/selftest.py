"""Does this drafter fit this target? Evaluates it as its file says, and with each metadata value that is easily wrong.

Tapped layers are numbered in three ways that differ by one, and the mask token is a number in a config: both pass every
shape check, and both cost much of the acceptance when wrong. So the neighbours are tried, on the same blocks.

Each neighbour loads the target again. For a large one that takes far longer than the test, so there the neighbours are
tried only on request, or when the file's own values look wrong; the report says when they were not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from rich.table import Table

from . import _core
from .corpus import Sample
from .errors import DFlashError
from .evaluate import Evaluation, evaluate

PROMPTS: Final = (
    "def fibonacci(n):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import argparse\nimport json\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "The three laws of thermodynamics are as follows. First,",
    "Write a short letter to a friend about the weather.\n\nDear",
    "| name | type | description |\n|---|---|---|\n| id | int | ",
)
BETTER: Final = 1.10  # a variant must accept this many times what the file's own values do ...
SURE: Final = 2.0  # ... and its loss be lower by this many standard errors, paired
USELESS_K1: Final = 0.15  # slot 1 right less often: no trained drafter, or another target's
OFF_POLICY: Final = 0.5  # the target agrees with fewer tokens of the data: not its own text
FAR_BELOW: Final = 0.8  # of the expected acceptance
QUICK_BYTES: Final = 8 * 2**30  # weights of a target that loads in seconds, some times over
DOUBTFUL_K1: Final = 0.5  # slot 1 right less often: worth loading a large target again
NOT_TRIED: Final = "not tried"


@dataclass(frozen=True)
class Variant:
    """One way to read the drafter. problem: why it cannot be run, or empty."""

    name: str
    tap_shift: int = 0
    mask_token_id: int | None = None
    result: Evaluation | None = None
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """Variants, the file's own first; what is wrong, one sentence each (none: it fits)."""

    variants: tuple[Variant, ...]
    findings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def complete(self) -> bool:
        """Whether the neighbours were tried too; taps off by one may accept enough to look right alone."""
        return all(v.problem != NOT_TRIED for v in self.variants)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [
            {"name": v.name, "tap_shift": v.tap_shift, "mask_token_id": v.mask_token_id, "problem": v.problem}
            | (v.result.to_dict() if v.result is not None else {})
            for v in self.variants
        ]
        return {"fits": self.fits, "complete": self.complete, "findings": list(self.findings), "variants": rows}

    def table(self) -> Table:
        """A rich table for people."""
        out = Table(title="does the drafter fit?")
        for name in ("variant", "m_accept", "k=1", "k=2", "k=4", "val_loss"):
            out.add_column(name, justify="left" if name == "variant" else "right")
        for v in self.variants:
            if v.result is None:
                out.add_row(v.name, v.problem or "not run")
                continue
            k = v.result.cumulative
            shares = [f"{k[i]:.1%}" if i < len(k) else "-" for i in (0, 1, 3)]
            out.add_row(v.name, f"{v.result.m_accept:.3f}", *shares, f"{v.result.val_loss:.3f}")
        return out


def variants_of(drafter: dict[str, Any], n_vocab: int) -> tuple[Variant, ...]:
    """What to try: the file's values, taps one layer earlier and later, the neighbouring mask ids."""
    mask = int(drafter["mask_token_id"])
    out = [Variant("as the file says"), Variant("taps one layer earlier", -1), Variant("taps one layer later", 1)]
    out += [Variant(f"mask id {m}", 0, m) for m in (mask - 1, mask + 1) if 0 <= m < n_vocab]
    return tuple(out)


def own_text(session: _core.Session, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Sample]:
    """The target's greedy continuation of each prompt, with the prompt masked out."""
    params = _core.SamplingParams()
    out = []
    for i, prompt in enumerate(prompts):
        done, total = -1, 0
        session.begin(list(prompt), params, max_tokens=max_tokens)
        while done < total:
            done, total = session.prefill()
        while session.step().stop is None:
            pass
        tokens = np.array(session.tokens, dtype=np.int32)
        out.append(Sample(f"own text {i}", tokens, np.arange(len(tokens)) >= len(prompt)))
    return out


def agreement(session: _core.Session, samples: Sequence[Sample], most: int = 256) -> float:
    """Share of tokens that are the target's own greedy choice, over the first sequences up to `most` tokens in all."""
    hits = total = 0
    for sample in samples:
        tokens = sample.tokens[: min(most - total, len(sample.tokens))]
        if len(tokens) < 2:
            break
        own = session.logits(tokens)[:-1].argmax(axis=1) == tokens[1:]
        if sample.loss_mask is not None:
            own = own[sample.loss_mask[1 : len(tokens)]]
        hits += int(own.sum())
        total += len(own)
    return hits / total if total else 1.0


def judge(variants: Sequence[Variant], *, data_agreement: float | None, expected: float | None) -> tuple[str, ...]:
    """What is wrong, from the evaluations. expected: m_accept that the drafter's card promises on such data."""
    base = variants[0].result
    if base is None:
        return (f"the drafter could not be run: {variants[0].problem}",)
    findings = []
    ran = [(v, v.result) for v in variants[1:] if v.result is not None]
    better = [(v, r) for v, r in ran if r.m_accept > BETTER * base.m_accept and _sure(base, r)]
    if better:
        best, result = max(better, key=lambda pair: pair[1].m_accept)
        findings.append(
            f"'{best.name}' accepts {result.m_accept:.2f} tokens a block, the file's own values {base.m_accept:.2f}: "
            "the metadata is off; convert the drafter again with that value"
        )
    if base.cumulative[0] < USELESS_K1 and not better:
        findings.append(
            f"slot 1 is right in {base.cumulative[0]:.1%} of the blocks and no variant is better: "
            "the drafter is not trained, or was trained for another target"
        )
    if data_agreement is not None and data_agreement < OFF_POLICY:
        findings.append(
            f"the target itself agrees with {data_agreement:.0%} of the data: it is not its own text, so the numbers "
            "say little; leave --data out, or capture sequences with dflash-cpp capture"
        )
    if expected is not None and base.m_accept < FAR_BELOW * expected:
        findings.append(f"m_accept {base.m_accept:.2f} is far below the {expected:.2f} expected")
    return tuple(findings)


def doubtful(own: Evaluation, expected: float | None) -> bool:
    """Whether the file's own values accept so little that the neighbours are worth their loading."""
    return own.cumulative[0] < DOUBTFUL_K1 or (expected is not None and own.m_accept < FAR_BELOW * expected)


def _sure(base: Evaluation, other: Evaluation) -> bool:
    """Whether other is better beyond chance: its loss is lower, paired by sequence (losses vary less than runs)."""
    gain = (base.losses - other.losses).mean(axis=1)
    means = np.array([gain[base.sequence == s].mean() for s in np.unique(base.sequence)])
    if len(means) < 2:
        return bool(means.mean() > 0)
    return bool(means.mean() > SURE * means.std(ddof=1) / np.sqrt(len(means)))


def selftest(
    target: str | os.PathLike[str],
    drafter: str | os.PathLike[str],
    *,
    samples: Sequence[Sample] | None,
    prompts: Sequence[Sequence[int]] = (),
    max_tokens: int = 160,
    anchors: int = 12,
    expected: float | None = None,
    backend: str = "auto",
    n_threads: int = 0,
    try_variants: bool | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Runs the test.

    samples: held-out sequences; None: the target continues prompts (token ids) by max_tokens tokens.
    expected: m_accept to compare with. on_progress: called with (variants done, all).
    try_variants: whether to try the neighbours; None: for a target of up to QUICK_BYTES, or a doubtful result.
    """

    def load(v: Variant) -> _core.Model:
        return _core.Model(
            os.fspath(target), os.fspath(drafter), backend=backend, n_threads=n_threads,
            tap_shift=v.tap_shift, mask_token_id=v.mask_token_id,
        )  # fmt: skip

    model = load(Variant(""))
    config, shape = model.drafter_config, model.target_config
    assert config is not None
    block = int(config["block_size"])
    own, *others = variants_of(config, int(shape["n_vocab"]))
    longest = max((len(s.tokens) for s in samples), default=0) if samples is not None else 0
    n_ctx = max(longest, max((len(p) for p in prompts), default=0) + max_tokens) + block
    session = _core.Session(model, n_ctx=n_ctx)
    data_agreement: float | None = None
    if samples is None:
        samples = [s for s in own_text(session, prompts, max_tokens) if len(s.tokens) > block + len(prompts[0])]
        if not samples:
            raise DFlashError("selftest: the target ends every answer at once; give sequences with --data")
    else:
        data_agreement = agreement(session, samples)
    result = evaluate(session, block, samples, anchors=anchors)
    del session, model  # two copies of a large target do not fit
    if try_variants is None:
        try_variants = int(shape["weight_bytes"]) <= QUICK_BYTES or doubtful(result, expected)
    done = [replace(own, result=result)]
    planned = 1 + len(others) if try_variants else 1
    if on_progress is not None:
        on_progress(1, planned)
    for v in others:
        if not try_variants:
            done.append(replace(v, problem=NOT_TRIED))
            continue
        try:
            session = _core.Session(load(v), n_ctx=n_ctx)
        except DFlashError as e:
            done.append(replace(v, problem=str(e)))
        else:
            done.append(replace(v, result=evaluate(session, block, samples, anchors=anchors)))
            del session
        if on_progress is not None:
            on_progress(len(done), planned)
    findings = judge(done, data_agreement=data_agreement, expected=expected)
    return Report(tuple(done), findings)
