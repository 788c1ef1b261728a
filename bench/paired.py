#!/usr/bin/env python3
"""What a way of decoding costs against plain decoding, to a few tenths of a percent, where the machine's speed swings.

    python bench/paired.py mini-m2.gguf mini-m2-dflash.gguf prompts.jsonl --arms plain,auto --rounds 20

All arms write the same text (no depth changes it), each in a session of its own in one process, and take turns of a few
tokens in random order, so that slow stretches of the machine hit all of them at the same place of the text. The first
COLD steps of a turn, which find the other arms' keys and values in the caches, are not timed. A step counts at most
SLOWEST times the median of its kind: that cuts what interrupted it and nothing else. Speed is the first arm's seconds a
token over the arm's; behind it half the 95% interval that rounds drawn anew (bootstrap) give. The first arm runs twice:
"null" is it against itself, the error of the comparison; the others are compared with the mean of the two.

Arms: plain (depth 0), alone (the target loaded without a drafter: its own threads and weights, so compare it in long
turns, --turn 40), 1, 2, ... (that depth), auto, auto-no-lookup. Every text has new sessions (where their memory lies is
worth some tenths of a percent, too), which first write it --warm-up times untimed, so that the policy has settled as in
a long conversation. With --fresh every round has new ones instead, which have learned nothing yet: the first answer
of an Engine. With --keep one session of each arm writes all texts one after the other, as an Engine given one unrelated
prompt after another does.

Turns of 6 tokens hold few steps that commit several: for fixed depths take longer ones, --turn 24.
Interleaved sessions share caches: what a drafter run pushed out is paid by the rest of its turn and then by the others.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dflash_cpp import _core
from dflash_cpp.corpus import read_corpus
from dflash_cpp.tokenizer import Tokenizer

SLOWEST = 5.0  # a step that takes in a backlog of taps is three times as long as others of its kind
COLD = 2  # steps at the start of a turn that are not timed
Kind = tuple[str, int]  # who drafted, how many were verified
Step = tuple[Kind, int, float]  # tokens committed, seconds


@dataclass
class Arm:
    """One way of decoding, and its session."""

    name: str
    way: str  # plain, alone, auto, auto-no-lookup or a depth
    model: _core.Model
    n_ctx: int
    session: _core.Session = field(init=False)
    at: int = 0  # tokens of the text written so far
    steps: list[Step] = field(default_factory=list)  # the timed ones of this round
    done: Counter[str] = field(default_factory=Counter)  # what the session itself counts, from the first token on

    def open(self) -> None:
        """A new session, which has learned nothing."""
        self.session = _core.Session(self.model, n_ctx=self.n_ctx)

    def begin(self, prompt: Sequence[int], args: argparse.Namespace) -> None:
        """Runs the prompt and commits the first token."""
        sampling = _core.SamplingParams()
        sampling.temperature, sampling.seed = args.temperature, args.seed
        self.session.rewind(0)
        depth = -1 if self.way.startswith("auto") else int(self.way) if self.way.isdigit() else 0
        self.session.begin(prompt, sampling, max_tokens=args.tokens, depth=depth, lookup=self.way == "auto")
        done, total = 0, 1
        while done < total:
            done, total = self.session.prefill()
        self.at = len(self.session.step().tokens)
        self.steps = []
        self._count(-1)

    def take_turn(self, to: int, at_least: int = COLD + 1) -> None:
        """Steps until so many tokens are there and, if it takes any, at_least of them; COLD untimed, then timed."""
        step = None
        steps = 0
        while self.at < to or 0 < steps < at_least:
            if step is not None and step.stop is not None:
                return
            start = perf_counter()
            step = self.session.step()
            seconds = perf_counter() - start
            self.at += len(step.tokens)
            steps += 1
            if steps > COLD:
                self.steps.append(((step.source, step.drafted), len(step.tokens), seconds))

    def end(self) -> list[Step]:
        """The round's timed steps."""
        self._count(1)
        return self.steps

    def _count(self, sign: int) -> None:
        stats = self.session.stats()
        for key in ("steps", "proposed", "lookup_drafted", "lookup_accepted", "left_out_tokens"):
            self.done[key] += sign * stats[key]
        for stage, seconds in stats["seconds"].items():
            self.done[stage] += sign * seconds
        self.done["drafter_runs"] += sign * sum(t["calls"] for t in stats["draft_by_count"])


def run_round(arms: list[Arm], prompt: Sequence[int], args: argparse.Namespace, rng: random.Random) -> list[list[Step]]:
    """All arms write the text once, in turns: the timed steps of each."""
    for arm in arms:
        arm.begin(prompt, args)
    # The first turn is cut short by chance: which steps are timed must not follow from where a session does what.
    first = 1 + rng.randint(1, args.turn)
    for end in [*range(first, args.tokens, args.turn), args.tokens]:
        for arm in rng.sample(arms, len(arms)):
            arm.take_turn(end, at_least=1 if end == first else COLD + 1)
    return [arm.end() for arm in arms]


def seconds(rounds: list[list[Step]]) -> NDArray[np.float64]:
    """Of a token in each round, interruptions cut."""
    by_kind: dict[Kind, list[float]] = defaultdict(list)
    for steps in rounds:
        for kind, _, s in steps:
            by_kind[kind].append(s)
    most = {kind: SLOWEST * float(np.median(s)) for kind, s in by_kind.items()}
    return np.array([sum(min(s, most[kind]) for kind, _, s in steps) / sum(n for _, n, _ in steps) for steps in rounds])


def speed(arm: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float]:
    """Of the arm against the base, and half its 95% interval."""
    both = np.stack([base, arm])
    drawn = both[:, np.random.default_rng(0).integers(base.size, size=(2000, base.size))].sum(axis=2)
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975))
    return float(base.sum() / arm.sum()), float(high - low) / 2


def speeds(rounds: dict[str, NDArray[np.float64]]) -> dict[str, tuple[float, float]]:
    """Of all arms: null against the first, the others against the mean of the two."""
    base, null, *_ = rounds.values()
    return {name: speed(s, base if s is null else (base + null) / 2) for name, s in list(rounds.items())[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="GGUF")
    parser.add_argument("drafter", help="GGUF")
    parser.add_argument("prompts", nargs="+", help="files of token ids or text, as for dflash-cpp eval")
    parser.add_argument("--arms", default="plain,auto", help="the first is what the others are compared with")
    parser.add_argument("--texts", default="", help="indices of the prompts to use, as 0,3,5; default: all")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="at most so many of each prompt (256)")
    parser.add_argument("--tokens", type=int, default=200, help="generated for each text (200)")
    parser.add_argument("--rounds", type=int, default=20, help="that each text is written (20)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before those (2)")
    parser.add_argument(
        "--turn", type=int, default=1, help=f"tokens (1); of more than {COLD} the first {COLD} are not timed"
    )
    sessions = parser.add_mutually_exclusive_group()
    sessions.add_argument("--fresh", action="store_true", help="a new session for every text and round")
    sessions.add_argument("--keep", action="store_true", help="the same sessions for all texts, one after the other")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--json", help="write the results there")
    args = parser.parse_args()

    def load(drafter: str | None) -> _core.Model:
        return _core.Model(
            args.target, drafter, backend="cpu", n_threads=args.threads, cpu_isa=args.isa, draft_head="auto"
        )

    names = args.arms.split(",")
    pair, alone = load(args.drafter), load(None) if "alone" in names else None
    n_ctx = args.prompt_tokens + args.tokens + 1
    models = {name: alone if name == "alone" and alone is not None else pair for name in names}
    arms = [Arm(name, name, models[name], n_ctx) for name in names]
    arms.insert(1, Arm("null", names[0], models[names[0]], n_ctx))
    samples = read_corpus(args.prompts, Tokenizer(_core.Gguf(args.target)), pair.target_config["n_vocab"])
    chosen = [int(i) for i in args.texts.split(",")] if args.texts else range(len(samples))

    print(f"{pair.backend_description}, T = {args.temperature:g}; speed against {names[0]}, +- half the 95% interval")
    others = [arm.name for arm in arms[1:]]
    print(f"{'text':<6}{'us/token':>9}" + "".join(f"{name:>18}" for name in others))
    results: list[dict[str, Any]] = []
    pooled: dict[str, list[NDArray[np.float64]]] = {arm.name: [] for arm in arms}
    rng = random.Random(args.seed)
    rounds = range(-args.warm_up, args.rounds)
    order = [(i, r) for r in rounds for i in chosen] if args.keep else [(i, r) for i in chosen for r in rounds]
    written: dict[int, dict[str, list[list[Step]]]] = {i: {arm.name: [] for arm in arms} for i in chosen}
    for i, r in order:
        if args.fresh or (i, r) == order[0] or (r == rounds[0] and not args.keep):
            for arm in arms:
                arm.open()
        steps = run_round(arms, samples[i].tokens[: args.prompt_tokens].tolist(), args, rng)
        if r < 0:
            continue
        for arm, of_arm in zip(arms, steps, strict=True):
            written[i][arm.name].append(of_arm)
        if r != rounds[-1]:
            continue
        found = {name: seconds(s) for name, s in written[i].items()}
        row, unit = speeds(found), float(found[names[0]].mean())
        for name, s in found.items():
            pooled[name].append(s / unit)
        us = 1e6 * unit
        print(f"{i:<6}{us:>9.1f}" + "".join(f"{s:>10.4f} +-{e:.4f}" for s, e in row.values()), flush=True)
        results.append({"text": i, "us_per_token": us, "speed": row})
    every = speeds({name: np.concatenate(s) for name, s in pooled.items()})
    print(f"{'all':<15}" + "".join(f"{s:>10.4f} +-{e:.4f}" for s, e in every.values()))
    for arm in arms:
        n, busy = arm.done["steps"], sum(arm.done[k] for k in ("draft", "verify", "sample", "ingest"))
        print(
            f"{arm.name:<15} drafter runs a step {arm.done['drafter_runs'] / n:.4f}, tokens left out"
            f" {arm.done['left_out_tokens'] / n:.2f}, copied {arm.done['lookup_drafted'] / n:.3f} and right"
            f" {arm.done['lookup_accepted'] / n:.3f}; of the time draft {arm.done['draft'] / busy:.2%},"
            f" ingest {arm.done['ingest'] / busy:.2%}, sample {arm.done['sample'] / busy:.2%}"
        )
    if args.json:
        result = {"kind": "paired", "options": vars(args), "texts": results, "all": every}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
