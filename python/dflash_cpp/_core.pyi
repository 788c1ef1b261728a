"""The compiled engine. Everything here releases the GIL while it computes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

class DFlashError(ValueError):
    """Wrong input: the message names it, says what was expected and found, and a way out."""

class CapacityError(DFlashError):
    """The request does not fit: context full, memory short."""

class TensorInfo:
    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str:
        """ "Q4_0", "F32", ..."""
    @property
    def shape(self) -> tuple[int, ...]:
        """ggml order: fastest dimension first."""
    @property
    def offset(self) -> int:
        """Bytes from the start of the file."""
    @property
    def nbytes(self) -> int: ...

class Gguf:
    """Strict, lazy reader of one GGUF file; raises DFlashError naming file, key or tensor."""

    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def keys(self) -> list[str]: ...
    @property
    def tensors(self) -> list[TensorInfo]: ...
    def __contains__(self, key: str) -> bool: ...
    def get(self, key: str, default: Any = None) -> Any:
        """Scalar, str, list[str] or 1-D numpy array."""
    def tensor(self, name: str) -> NDArray[np.float32]:
        """Decoded values, numpy order (slowest dimension first)."""

class Model:
    """Target and optional drafter on one backend; read-only."""

    def __init__(
        self,
        target: str,
        drafter: str | None = None,
        *,
        backend: str = "auto",
        n_threads: int = 0,
        precise: bool = False,
        cpu_isa: str = "auto",
        repack: bool = True,
        numa: str = "auto",
        progress: Callable[[str, int, int], None] | None = None,
        tap_shift: int = 0,
        mask_token_id: int | None = None,
        n_ctx: int | None = None,
        kv_type: str = "auto",
        n_batch: int = 512,
        draft_head: str = "target",
    ) -> None:
        """progress(stage, done_bytes, total_bytes) is called while weights are loaded. tap_shift and mask_token_id
        override the drafter's metadata (selftest tries the neighbours with them). n_ctx, kv_type, n_batch: of the
        session that will be opened, so that its memory is counted before loading (None: weights alone).
        draft_head: which head the drafter uses, see `EngineOptions`."""
    @staticmethod
    def synthetic(
        target: dict[str, int | float],
        drafter: dict[str, Any] | None = None,
        *,
        matrices: str = "Q4_0",
        head: str = "Q8_0",
        drafter_matrices: str = "Q8_0",
        draft_head: str | None = None,
        branch_gain: float = 1.0,
        backend: str = "auto",
        n_threads: int = 0,
        cpu_isa: str = "auto",
        seed: int = 1,
    ) -> Model:
        """A model of any shape with random weights, made in backend memory. target: n_layer, n_embd, n_head,
        n_head_kv, head_dim, n_rot, n_expert, n_expert_used, n_ff, n_vocab (optional rope_theta, rms_eps);
        drafter: n_layer, n_head, n_head_kv, head_dim, n_ff, block_size, target_layers (optional rope_theta).
        draft_head: type of a head of the drafter's own (None: it borrows the target's).
        branch_gain: weight of the layers' input norms; at 1 random rows grow alike and share experts, smaller
        leaves each row experts of its own (look at experts_by_width)."""
    @property
    def target_config(self) -> dict[str, Any]:
        """n_layer, n_embd, n_head, n_head_kv, head_dim, n_rot, n_expert, n_expert_used, n_ff, n_vocab, rope_theta,
        rope_inv_freq [n_rot / 2], rope_scale, rms_eps, n_ctx_train, weight_bytes, bytes_per_token,
        expert_bytes_per_token (the experts' share of it)."""
    @property
    def drafter_config(self) -> dict[str, Any] | None:
        """n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, block_size, target_layers, mask_token_id, rope_theta,
        rope_inv_freq, rope_scale, rms_eps, sliding_window, causal, weight_bytes (without the head), head_type and
        head_bytes (of the head it drafts with)."""
    @property
    def backend(self) -> str:
        """ "cpu" or "hip"."""
    @property
    def backend_description(self) -> str: ...
    @property
    def memory_warning(self) -> str:
        """On the CPU, when more memory is needed than is free: each part, how much is missing, what would help."""
    @property
    def n_threads(self) -> int: ...

class SamplingParams:
    """Plain record; defaults are greedy."""

    temperature: float  # <= 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    seed: int  # the draw at a position depends on (seed, position) only
    repetition_penalty: float  # 1: off (divides positive logits, multiplies negative ones)
    presence_penalty: float
    frequency_penalty: float
    penalty_last_n: int  # tokens looked back at, prompt included; -1: all
    logit_bias: dict[int, float]
    logits_hook: Callable[[NDArray[np.int32], NDArray[np.float32]], None] | None
    """Called for each target row in order with (all tokens so far, logits row [n_vocab], writable in place)."""
    def __init__(self) -> None: ...

def sampling_distribution(
    logits: NDArray[np.float32], history: Sequence[int] | NDArray[np.int32], params: SamplingParams
) -> NDArray[np.float64]:
    """The distribution [n_vocab] a token is drawn from, after every option, for one row of logits [n_vocab]."""

class StepResult:
    @property
    def tokens(self) -> list[int]:
        """Tokens committed by this step: accepted drafts, then the target's own."""
    @property
    def drafted(self) -> int: ...
    @property
    def accepted(self) -> int: ...
    @property
    def source(self) -> str:
        """Who drafted: "prefill" (the first token), "none" (plain decoding), "dflash" or "lookup"."""
    @property
    def stop(self) -> str | None:
        """None, "eos", "length" (max_tokens) or "context" (n_ctx reached); nothing follows when not None."""

class Session:
    """One timeline: target KV, drafter KV, tokens, statistics."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 8192,
        kv_type: str = "auto",
        n_batch: int = 512,
        draft_rows: str = "auto",
    ) -> None:
        """kv_type: "f16", "q8_0", "f32" or "auto" (f16; f32 in precise mode). draft_rows: mask rows the drafter runs,
        "slots" (those asked for), "block" (all; better drafts for more work) or "auto" (block where the drafter reads
        less than a quarter of a target pass)."""
    @property
    def n_ctx(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def pos(self) -> int:
        """Tokens whose KV is in the cache."""
    @property
    def tokens(self) -> list[int]: ...
    def begin(
        self,
        tokens: Sequence[int] | NDArray[np.int32],
        sampling: SamplingParams,
        *,
        max_tokens: int,
        depth: int = -1,
        eos_ids: Sequence[int] = (),
        lookup: bool = True,
        simulate_accept: Sequence[float] = (),
        simulate_spread: float = 0.0,
    ) -> int:
        """Starts a generation: keeps the common prefix of the caches and returns its length. depth: -1 auto,
        0..block_size-1 fixed. simulate_accept[i]: impose acceptance, the chance that drafts 1..i+1 all stand
        (benchmarks of synthetic models; the drafter's confidences are replaced to match). simulate_spread, 0..1: how
        far a draft's own chance, which is its confidence, lies from its slot's average. Raises DFlashError (empty
        prompt, token out of range), CapacityError (too long)."""
    def prefill(self) -> tuple[int, int]:
        """Runs one chunk of the prompt; (done, total). Call until done == total."""
    def step(self) -> StepResult:
        """One round: draft, verify, accept, ingest. The first call after prefill returns the first token."""
    def rewind(self, pos: int) -> None:
        """Forgets everything from position pos on."""
    def stats(self) -> dict[str, Any]:
        """Of the current generation: prompt_tokens, cached_tokens, generated_tokens, steps, drafted, accepted,
        drafted_per_slot, accepted_per_slot, depth_histogram, seconds {prefill, draft, verify, sample, ingest},
        verify_by_width[w] {calls, seconds} of target passes of w rows, draft_by_count[n] {calls, seconds},
        experts_by_width[w] and expert_calls_by_width[w] (distinct experts read, summed over layers and passes),
        proposed (slots the drafter computed), lookup_drafted, lookup_accepted,
        left_out_tokens (committed while the drafter slept)."""
    def policy_state(self) -> dict[str, Any]:
        """What the depth policy believes now: verify_seconds[w - 1], draft_seconds[n - 1], ingest_seconds (a token
        of a backlog), best_rate (tokens a second), parked, asleep."""
    def session_stats(self) -> dict[str, Any]:
        """The same, summed over all generations of this session."""
    def logits(self, tokens: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
        """Target logits of every position [n, n_vocab]; the timeline is replaced by tokens."""
    def taps(self, tokens: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
        """Residual stream entering each tapped layer [n, n_taps, n_embd]; the timeline is replaced by tokens."""
    def draft_logits(
        self, tokens: Sequence[int] | NDArray[np.int32], anchor: int, n: int, block_rows: int = 0
    ) -> NDArray[np.float32]:
        """Drafter logits of slots 1..n [n, n_vocab] with tokens as committed context and anchor in slot 0.
        block_rows: rows the drafter runs (n + 1 .. block_size); 0 means the engine's choice."""

class DepthPolicy:
    """The depth policy alone: observations in, depth out, no clock inside. For replay and simulation."""

    def __init__(self, verify_prior: Sequence[float], draft_prior: float) -> None:
        """verify_prior[w - 1]: cost of a pass of w rows relative to one row; its length is the block size.
        draft_prior: cost of one drafter run, in the same unit."""
    def plan(
        self, max_depth: int, has_drafter: bool = True, lookup_match: int = 0, lookup_tokens: int = 0
    ) -> tuple[str, int]:
        """(source, n): "none", "dflash" (n slots to draft) or "lookup" (n tokens to verify)."""
    def verify_depth(self, confidence: Sequence[float]) -> int:
        """How many of the drafted slots to verify, given the drafter's top-1 probabilities."""
    def observe(
        self,
        source: str,
        *,
        verified: int,
        accepted: int,
        confidence: Sequence[float],
        draft_seconds: float,
        verify_seconds: float,
        lookup_match: int = 0,
        ingested: int = 0,
        ingest_seconds: float = 0.0,
    ) -> None:
        """One round's outcome. ingested: tokens that the drafter took in at one go since the last one."""
    def observe_unverified(self, slot: int, confidence: float, stood: bool) -> None:
        """Whether a drafted slot (from 0) that was not verified would have stood; all slots before it did."""
    def verify_cost(self, width: int) -> float:
        """Seconds of a pass of width rows, as the policy believes now."""
    def draft_cost(self, n: int) -> float: ...
    @property
    def parked(self) -> bool: ...
    @property
    def asleep(self) -> bool: ...
    @property
    def best_rate(self) -> float: ...

def default_threads() -> int: ...
def describe_numa() -> str: ...
def cpu_isas() -> list[str]:
    """Instruction sets this CPU and build offer, best first ("avx512vnni", "avxvnni", "avx2", "plain")."""

def backends() -> dict[str, str]:
    """Backend name -> "" when usable, else why not."""

def build_info() -> dict[str, str]:
    """Compiler, flags, GPU backend compiled in."""
