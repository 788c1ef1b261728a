"""`convert`: the one function behind the command line and the Python package."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGMLQuantizationType as GGMLType

from .checkpoint import Checkpoint
from .drafter import TAP_CONVENTIONS, is_drafter, plan_drafter
from .errors import ConvertError
from .gguf_out import check_output, check_space, write_gguf
from .hf_config import Config
from .linear import Encoder, TensorTable
from .plan import OUTTYPES, Options, Plan
from .progress import ConvertProgress, ProgressCallback, progress_bar
from .target import is_target, plan_target


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did.

    `types` counts tensors by GGUF type. `scales` and `mins` count quantisation groups; `scales_inexact` of the scales
    and `mins_rounded` of the Q4_1 minimums were rounded to f16, `values_rounded` of the unquantised weights changed in
    their new float type. `notes` are remarks for the user.
    """

    path: Path
    arch: str
    n_tensors: int
    bytes: int
    seconds: float
    types: dict[str, int]
    scales: int
    scales_inexact: int
    mins: int
    mins_rounded: int
    values_rounded: int
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether every scale, minimum and unquantised weight was carried over without rounding."""
        return not (self.scales_inexact or self.mins_rounded or self.values_rounded)


def convert(
    checkpoint_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target_model: str | os.PathLike[str] | None = None,
    outtype: str | None = None,
    head: str | None = None,
    embedding: str | None = None,
    tap_convention: str = "after",
    allow_inexact: bool = False,
    progress: bool | ProgressCallback = False,
) -> ConvertReport:
    """Convert a MiniMax-M2 checkpoint or a DFlash drafter to GGUF; config.json tells which it is.

    Args:
        checkpoint_dir: Hugging Face folder with config.json and safetensors files.
        out: the GGUF file to write. It appears only when complete; until then an earlier file stays.
        target_model: for a drafter, the target's checkpoint folder (config and tokenizer are read, weights are not).
        outtype: "f32", "f16", "bf16", "q8_0" or "q4_0" for unquantised matrices; default their stored type (drafters
            stored in f32 become f16 where exact, else bf16). Quantised weights always keep their integers; norms and
            routers are always f32.
        head, embedding: the same for the target's output head and token embedding, default their stored type.
        tap_convention: "after" if the drafter's layer ids mean "after layer t" (z-lab), "input" if "entering layer t".
        allow_inexact: round scales that f16 cannot hold exactly, instead of refusing them.
        progress: True for a bar on stderr, or a callback that gets `ConvertProgress` steps.

    Returns: a `ConvertReport`.
    Raises: `ConvertError`, before anything is written where possible. The output is never left half-written.
    """
    start = time.perf_counter()
    notes: list[str] = []
    options = Options(
        outtype=parse_type(outtype, "outtype"),
        head=parse_type(head, "head"),
        embedding=parse_type(embedding, "embedding"),
        tap_convention=tap_convention,
        allow_inexact=allow_inexact,
        note=notes.append,
    )
    if tap_convention not in TAP_CONVENTIONS:
        raise ConvertError(f"tap convention {tap_convention!r}: expected one of {', '.join(TAP_CONVENTIONS)}")
    out = check_output(Path(out))
    with Checkpoint(checkpoint_dir) as checkpoint:
        plan = make_plan(checkpoint, options, target_model)
        check_space(plan, out)
        encoder = Encoder(checkpoint, allow_inexact)
        with progress_bar(progress is True, out.name) as bar:
            callback = progress if callable(progress) else bar
            sources = [source for tensor in plan.tensors for source in tensor.sources]
            checked = [e for s in sources for e in (s.scale, s.declared) if e is not None]
            encoder.check_scales(sources, _counting(callback, "check", sum(e.nbytes for e in checked)))
            size = write_gguf(
                plan, out, encoder, _counting(callback, "write", sum(tensor.nbytes for tensor in plan.tensors))
            )
    counts = encoder.counts
    return ConvertReport(
        path=out,
        arch=plan.arch,
        n_tensors=len(plan.tensors),
        bytes=size,
        seconds=time.perf_counter() - start,
        types=dict(Counter(tensor.qtype.name for tensor in plan.tensors)),
        scales=counts.scales,
        scales_inexact=counts.scales_inexact,
        mins=counts.mins,
        mins_rounded=counts.mins_rounded,
        values_rounded=counts.values_rounded,
        notes=notes,
    )


def make_plan(checkpoint: Checkpoint, options: Options, target_model: str | os.PathLike[str] | None) -> Plan:
    """Tell target from drafter by config.json and plan the conversion. Raises `ConvertError` if it is neither."""
    config = Config.load(checkpoint.directory / "config.json")
    table = TensorTable(checkpoint)
    if is_drafter(config):
        for name, value in (("--head", options.head), ("--embedding", options.embedding)):
            if value is not None:
                raise ConvertError(f"{name}: a drafter has none of its own, it borrows the target's; leave it out")
        return plan_drafter(table, config, options, target_model)
    if is_target(config):
        if target_model is not None:
            raise ConvertError(f"--target-model is for drafters, and {config.path} describes a target; leave it out")
        if options.tap_convention != "after":
            raise ConvertError(f"--tap-convention is for drafters, and {config.path} describes a target; leave it out")
        return plan_target(table, config, options)
    raise ConvertError(
        f"{config.path}: expected a MiniMax-M2 model (model_type 'minimax_m2') or a DFlash drafter (dflash_config), "
        f"found model_type {config.values.get('model_type')!r}, architectures {config.values.get('architectures')!r}"
    )


def parse_type(name: str | None, option: str) -> GGMLType | None:
    """Return the GGUF type of a name such as "bf16", in any case. Raises `ConvertError` for others."""
    if name is None:
        return None
    qtype = OUTTYPES.get(name.lower())
    if qtype is None:
        raise ConvertError(f"{option} {name!r}: expected one of {', '.join(OUTTYPES)}")
    return qtype


def _counting(callback: ProgressCallback, phase: str, total: int) -> Callable[[int, str], None]:
    done = 0

    def step(count: int, tensor: str) -> None:
        nonlocal done
        done += count
        callback(ConvertProgress(phase, done, total, tensor))

    return step
