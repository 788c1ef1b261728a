"""Options as frozen dataclasses: the one list of names, defaults and ranges, for Python and the command line."""

from __future__ import annotations

import difflib
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import _core
from .errors import DFlashError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LoadProgress = Callable[[str, int, int], None]
LogitsHook = Callable[[NDArray[np.int32], NDArray[np.float32]], None]

BACKENDS: Final = ("auto", "cpu", "hip")
KV_TYPES: Final = ("auto", "f16", "q8_0", "f32")
DRAFT_HEADS: Final = ("auto", "target", "q8_0", "q4_0")
NUMA: Final = ("auto", "off", "interleave")
MAX_SEED: Final = 2**63 - 1
MAX_TOKEN_ID: Final = 2**31 - 1
LARGE: Final = 1e30  # edits of logits up to here stay finite, added up and multiplied


class EngineKwargs(TypedDict, total=False):
    """Keyword arguments of `Engine`; see `EngineOptions` for meaning and defaults."""

    backend: str
    precise: bool
    n_ctx: int
    n_threads: int | None
    kv_type: str
    n_batch: int
    cpu_isa: str
    repack: bool
    numa: str
    draft_head: str
    progress: LoadProgress | None


class GenerateKwargs(TypedDict, total=False):
    """Keyword arguments of `Engine.generate`, `.stream` and `.chat`; see `GenerateOptions`."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: str | Sequence[str]
    depth: int | Literal["auto"]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_last_n: int
    logit_bias: Mapping[int, float] | None
    logits_hook: LogitsHook | None
    ignore_eos: bool
    lookup: bool


def _fail(name: str, expected: str, found: object) -> DFlashError:
    return DFlashError(f"{name}: expected {expected}, found {found!r}")


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    expected = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise _fail(name, expected, value)
    if value < low or (high is not None and value > high):
        raise _fail(name, expected, value)


def _check_float(name: str, value: object, expected: str, valid: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise _fail(name, expected, value)
    with np.errstate(over="ignore"):
        single = float(np.float32(value))  # what the engine computes with
    if not math.isfinite(single) or not valid(single):
        raise _fail(name, expected, value)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _fail(name, "True or False", value)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise _fail(name, "one of " + ", ".join(repr(c) for c in choices), value)


@dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded and run.

    backend: "auto", "cpu" or "hip".
    precise: f32 activations (the reference mode, slower) instead of int8 ones.
    n_ctx: tokens of context, prompt and answer together.
    n_threads: CPU threads; None: one for each core this process may use (affinity mask and container quota).
    kv_type: cache type, "f16", "q8_0", "f32" or "auto" (f16; f32 in precise mode).
    n_batch: prompt tokens of one prefill chunk.
    cpu_isa: instruction set, "auto" (the best one) or one that `dflash-cpp doctor` lists.
    repack: reorder weights in memory for speed; off, they are used where the file is mapped: opening is instant,
        several processes share them, what does not fit is read again, and steps are slower (docs/performance.md).
    numa: memory on machines with several NUMA nodes: "interleave" it over those the threads may run on, "off" (where
        it is first touched) or "auto" (interleave when there is more than one).
    draft_head: the output head the drafter uses: "target" (the target's own), or a copy of it rounded to "q8_0" or
        "q4_0", which is read faster. "auto": q4_0 where that is smaller, "target" in precise mode and without
        `repack`. Drafts are only proposals, so this changes how many stand and what they cost, never the answer.
    progress: called with (stage, done bytes, total bytes) while weights are loaded.
    """

    backend: str = "auto"
    precise: bool = False
    n_ctx: int = 8192
    n_threads: int | None = None
    kv_type: str = "auto"
    n_batch: int = 512
    cpu_isa: str = "auto"
    repack: bool = True
    numa: str = "auto"
    draft_head: str = "auto"
    progress: LoadProgress | None = None

    def __post_init__(self) -> None:
        _check_choice("backend", self.backend, BACKENDS)
        _check_bool("precise", self.precise)
        _check_int("n_ctx", self.n_ctx, 2, 2**24)
        if self.n_threads is not None:
            _check_int("n_threads", self.n_threads, 1, 4096)
        _check_choice("kv_type", self.kv_type, KV_TYPES)
        _check_int("n_batch", self.n_batch, 1, 2**16)
        _check_choice("cpu_isa", self.cpu_isa, ("auto", *_core.cpu_isas()))
        _check_bool("repack", self.repack)
        _check_choice("numa", self.numa, NUMA)
        _check_choice("draft_head", self.draft_head, DRAFT_HEADS)
        if self.progress is not None and not callable(self.progress):
            raise _fail("progress", "a function of (stage, done, total) or None", self.progress)


@dataclass(frozen=True)
class GenerateOptions:
    """How one answer is generated. The defaults are greedy.

    max_tokens: most tokens to generate; None: until the context is full.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most probable tokens; 0: off.
    top_p: keep the fewest tokens whose probability reaches this; 1: off.
    min_p: drop tokens below this share of the most probable one; 0: off.
    seed: the draw at a position depends on (seed, position) only; None: drawn, and reported in the statistics.
    stop: strings that end the answer; they are not part of its text.
    depth: drafts per round, 0..block_size - 1, or "auto". Changes the speed, never the answer.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen (Keskar et al. 2019); 1: off;
        1e-6 to 1e6.
    presence_penalty, frequency_penalty: subtracted once, and once per occurrence; 0: off.
    penalty_last_n: tokens looked back at for the penalties, prompt included; -1: all.
    logit_bias: token id -> number added to its logit; -inf forbids the token.
    logits_hook: called for each target row in order with (tokens so far, logits [n_vocab] to change in place).
    ignore_eos: go on after the model's end-of-sequence token.
    lookup: let n-gram matches in the session's own tokens compete as drafts.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    depth: int | Literal["auto"] = "auto"
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] | None = None
    logits_hook: LogitsHook | None = None
    ignore_eos: bool = False
    lookup: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_float("temperature", self.temperature, "a number of at least 0", lambda x: x >= 0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, "a number above 0 and up to 1", lambda x: 0 < x <= 1)
        _check_float("min_p", self.min_p, "a number in 0..1", lambda x: 0 <= x <= 1)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        for s in self.stops:
            if not isinstance(s, str) or not s:
                raise _fail("stop", "a non-empty string, or a sequence of them", s)
        if not (isinstance(self.depth, str) and self.depth == "auto"):
            _check_int("depth", self.depth, 0)
        # the limits as rounded to single precision are within
        _check_float(
            "repetition_penalty", self.repetition_penalty, "a number in 1e-6..1e6", lambda x: 0.9e-6 < x < 1.1e6
        )
        for name in ("presence_penalty", "frequency_penalty"):
            expected = f"a number in {-LARGE:g}..{LARGE:g}"
            _check_float(name, getattr(self, name), expected, lambda x: abs(x) < 1.1 * LARGE)
        _check_int("penalty_last_n", self.penalty_last_n, -1, 2**31 - 1)
        self._check_bias()
        if self.logits_hook is not None and not callable(self.logits_hook):
            raise _fail("logits_hook", "a function of (tokens, logits) or None", self.logits_hook)
        _check_bool("ignore_eos", self.ignore_eos)
        _check_bool("lookup", self.lookup)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise _fail("logit_bias", "a mapping of token id to number", self.logit_bias)
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias token id", token, 0, MAX_TOKEN_ID)
            if bias != -math.inf:
                expected = f"a number up to {LARGE:g}, or -inf to forbid it"
                _check_float(f"logit_bias of token {token}", bias, expected, lambda x: x < 1.1 * LARGE)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple, whichever way they were given."""
        if isinstance(self.stop, str):
            return (self.stop,)
        if not isinstance(self.stop, Sequence):
            raise _fail("stop", "a string or a sequence of strings", self.stop)
        return tuple(self.stop)

    def resolved_seed(self) -> int:
        """The seed given, or a fresh one."""
        return int(self.seed) if self.seed is not None else secrets.randbits(62)

    def sampling_params(self, seed: int) -> _core.SamplingParams:
        """The compiled engine's record."""
        p = _core.SamplingParams()
        p.temperature = float(self.temperature)
        p.top_k = int(self.top_k)
        p.top_p = float(self.top_p)
        p.min_p = float(self.min_p)
        p.seed = seed
        p.repetition_penalty = float(self.repetition_penalty)
        p.presence_penalty = float(self.presence_penalty)
        p.frequency_penalty = float(self.frequency_penalty)
        p.penalty_last_n = int(self.penalty_last_n)
        p.logit_bias = {int(k): float(v) for k, v in (self.logit_bias or {}).items()}
        p.logits_hook = self.logits_hook
        return p


_Options = TypeVar("_Options", bound="DataclassInstance")


def option_names(cls: type[Any]) -> tuple[str, ...]:
    """Names of a dataclass' options, in order."""
    return tuple(f.name for f in fields(cls))


def make_options(cls: type[_Options], given: Mapping[str, Any], *, known: Sequence[str] = ()) -> _Options:
    """`cls(**given)`, where an unknown name is a DFlashError with the nearest known one.

    known: further names that the caller accepts, for the message only.
    """
    names = (*option_names(cls), *known)
    for name in given:
        if name not in option_names(cls):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known options: " + ", ".join(names)
            raise DFlashError(f"unknown option {name!r}; {hint}")
    return cls(**given)


def check_path(name: str, path: str | os.PathLike[str]) -> str:
    """The path as text. Raises DFlashError when there is no such file."""
    if not isinstance(path, (str, os.PathLike)):
        raise _fail(name, "a path", path)
    text = os.fspath(path)
    if not isinstance(text, str):
        raise _fail(name, "a path of text", text)
    if not os.path.isfile(text):  # noqa: PTH113 (a str has just been checked; no Path is needed)
        what = "nothing"
        if os.path.exists(text):  # noqa: PTH110
            folder = os.path.isdir(text)  # noqa: PTH112
            what = "a folder (convert it first: dflash-cpp convert)" if folder else "no regular file"
        raise DFlashError(f"{name}: expected a GGUF file at {text}, found {what}")
    return text
