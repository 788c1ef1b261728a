"""On-policy shards for people who train drafters: prompts in; token ids, loss mask and tapped hidden states out.

A shard is one sequence as safetensors (the offline layout of SpecForge and speculators): input_ids [S] int32, loss_mask
[S] uint8 (1 where the target wrote the token), hidden_states [S, n_taps * n_embd] bf16 or fp8. MiniMax-M2.7's residual
stream peaks beyond 2000, e4m3 ends at 448: fp8 is scaled per tensor (times hidden_states_scale) and saturates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .api import Engine
from .corpus import Sample, write_json_atomically
from .errors import CapacityError, DFlashError
from .options import GenerateOptions

if TYPE_CHECKING:
    from .options import GenerateKwargs

DTYPES: Final = ("bf16", "fp8_e4m3")
FP8_MAX: Final = 448.0
MANIFEST: Final = "capture.json"


@dataclass(frozen=True)
class CaptureOptions:
    """What is captured.

    dtype: of hidden_states, "bf16" or "fp8_e4m3". max_tokens: most tokens generated after a prompt. temperature,
    top_k, top_p: as they will be served. seed: of prompt i is seed + i. ignore_eos: go on after the end of sequence.
    """

    dtype: str = "bf16"
    max_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise DFlashError(f"dtype: expected one of {', '.join(DTYPES)}, found {self.dtype!r}")
        self.generation(0)

    def generation(self, i: int) -> GenerateKwargs:
        """Options of the answer to prompt i. Raises DFlashError for values out of range."""
        options: GenerateKwargs = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed + i,
            "ignore_eos": self.ignore_eos,
        }
        GenerateOptions(**options)
        return options


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of bfloat16, rounded to nearest even. Finite input."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def fp8_values() -> NDArray[np.float64]:
    """Values of the e4m3 codes 0..126, ascending (OCP OFP8: bias 7, no infinities, 127 is NaN)."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    values: NDArray[np.float64] = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(np.float64) - 10)
    )
    return values


def to_fp8(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], np.float32]:
    """Bits of e4m3 and the scale: x is about fp8 * scale, the largest magnitude maps to 448. Finite input."""
    peak = float(np.abs(x).max(initial=0.0))
    scale = np.float32(peak / FP8_MAX) if peak > 0 else np.float32(1.0)
    magnitude = np.minimum(np.abs(x.astype(np.float64)) / np.float64(scale), FP8_MAX)  # saturate: never NaN
    values = fp8_values()
    middle = (values[1:] + values[:-1]) / 2
    code = np.searchsorted(middle, magnitude, side="left")
    tie = (code < len(middle)) & (magnitude == middle[np.minimum(code, len(middle) - 1)]) & (code % 2 == 1)
    code = code + tie  # halfway: the even code
    return (code.astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 7)), scale


def _write_safetensors(path: Path, tensors: dict[str, tuple[str, NDArray[Any]]], metadata: dict[str, str]) -> None:
    """Tensors as name -> (dtype, bits). The library's numpy front end writes neither bf16 nor fp8; the format is a
    length, a JSON header and the bytes (huggingface/safetensors, README)."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).data)


def write_shard(
    path: Path,
    tokens: NDArray[np.int32],
    loss_mask: NDArray[np.bool_],
    hidden: NDArray[np.float32],
    dtype: str,
    metadata: dict[str, str],
) -> None:
    """One shard, whole or not at all. hidden [S, n_taps * n_embd], f32. Raises DFlashError for values not finite."""
    if not np.isfinite(hidden).all():
        raise DFlashError(f"{path}: hidden states: expected finite numbers, found infinities or NaN")
    bits: NDArray[Any]
    if dtype == "bf16":
        bits, scale = to_bf16(hidden), None
    else:
        bits, scale = to_fp8(hidden)
    # Widest first: every tensor starts at a multiple of its element size.
    tensors = {} if scale is None else {"hidden_states_scale": ("F32", np.array([scale], dtype="<f4"))}
    tensors["input_ids"] = ("I32", tokens.astype("<i4"))
    tensors["hidden_states"] = ("BF16" if scale is None else "F8_E4M3", bits)
    tensors["loss_mask"] = ("U8", loss_mask.astype(np.uint8))
    partial = path.with_name(path.name + ".partial")
    try:
        _write_safetensors(partial, tensors, {"format": "pt", **metadata})
        partial.replace(path)
    except OSError as e:
        raise DFlashError(f"{path}: cannot be written: {e}") from e
    finally:
        partial.unlink(missing_ok=True)


def _is_there(path: Path, prompt: Sample) -> bool:
    """Whether the prompt's shard is there and complete (its header matches its size).

    Raises DFlashError where it is another prompt's.
    """
    try:
        with safe_open(str(path), framework="numpy") as shard:
            n = int((shard.metadata() or {}).get("prompt_tokens", 0))
            same = np.array_equal(shard.get_tensor("input_ids")[:n], prompt.tokens)
    except (OSError, SafetensorError):
        return False
    if not same:
        raise DFlashError(f"{path}: it was made from another prompt than {prompt.name}; use another folder")
    return True


def capture(
    engine: Engine,
    prompts: Sequence[Sample],
    out_dir: str | os.PathLike[str],
    options: CaptureOptions,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Generates after every prompt and writes one shard each; returns the paths.

    Shards already there and whole are kept, so that an interrupted run goes on where it was. Raises DFlashError when
    the folder holds shards of other options or prompts, and for an engine without a drafter (it says which layers are
    tapped); CapacityError for a prompt longer than the context, before any work.
    """
    config = engine.model.drafter_config
    if config is None:
        raise DFlashError("capture: a drafter says which layers are tapped; give one")
    for prompt in prompts:
        if len(prompt.tokens) > engine.n_ctx:
            raise CapacityError(
                f"{prompt.name}: expected at most n_ctx = {engine.n_ctx} tokens, found {len(prompt.tokens)}; leave it "
                "out or raise n_ctx"
            )
    out = Path(out_dir)
    target = engine.model.target_config
    manifest = {
        "format": "dflash-cpp capture 1",
        "target": target["name"],
        "n_embd": target["n_embd"],
        "target_layers": list(config["target_layers"]),  # inputs of these layers; z-lab's ids are one less
        "precise": engine.options.precise,
        "options": asdict(options),
    }
    _check_folder(out, manifest)
    paths = []
    for i, prompt in enumerate(prompts):
        path = out / f"{i:06d}.safetensors"
        if not _is_there(path, prompt):
            _capture_one(engine, prompt, path, options, i, manifest)
        paths.append(path)
        if on_progress is not None:
            on_progress(i + 1, len(prompts))
    return paths


def _check_folder(out: Path, manifest: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DFlashError(f"out: expected a folder that can be made at {out}: {e}") from e
    path = out / MANIFEST
    if path.exists() and any(out.glob("*.safetensors")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise DFlashError(f"{path}: expected the options of an earlier capture as JSON: {e}") from e
        if found != manifest:
            names = sorted(k for k in {*found, *manifest} if found.get(k) != manifest.get(k))
            raise DFlashError(
                f"{out}: it holds shards of another capture ({', '.join(names)} differ); use another folder"
            )
    else:
        write_json_atomically(path, manifest)


def _capture_one(
    engine: Engine, prompt: Sample, path: Path, options: CaptureOptions, i: int, manifest: dict[str, Any]
) -> None:
    answer = engine.generate(prompt.tokens, **options.generation(i))
    tokens = np.array([*prompt.tokens.tolist(), *answer.tokens], dtype=np.int32)
    loss_mask = np.arange(len(tokens)) >= len(prompt.tokens)
    hidden = engine.taps(tokens).reshape(len(tokens), -1)
    metadata = {
        "target": str(manifest["target"]),
        "target_layers": json.dumps(manifest["target_layers"]),
        "n_embd": str(manifest["n_embd"]),
        "prompt": prompt.name,
        "prompt_tokens": str(len(prompt.tokens)),
        "finish_reason": answer.finish_reason,
        "seed": str(options.seed + i),
        "options": json.dumps(asdict(options)),
    }
    write_shard(path, tokens, loss_mask, hidden, options.dtype, metadata)
