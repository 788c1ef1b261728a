"""What is to be written: metadata and tensors, decided completely before the first byte goes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from .errors import ConvertError
from .linear import Source

OUTTYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}


@dataclass(frozen=True, slots=True)
class MetaValue:
    """One GGUF metadata value; `item` is the element type of an array."""

    value: Any
    type: GGUFValueType
    item: GGUFValueType | None = None


class Metadata(dict[str, MetaValue]):
    """GGUF metadata in file order, with one setter per value type."""

    def u32(self, key: str, value: int) -> None:
        """Set an unsigned 32-bit integer."""
        self[key] = MetaValue(value, GGUFValueType.UINT32)

    def i32(self, key: str, value: int) -> None:
        """Set a signed 32-bit integer."""
        self[key] = MetaValue(value, GGUFValueType.INT32)

    def f32(self, key: str, value: float) -> None:
        """Set a 32-bit float."""
        self[key] = MetaValue(value, GGUFValueType.FLOAT32)

    def flag(self, key: str, value: bool) -> None:
        """Set a boolean."""
        self[key] = MetaValue(value, GGUFValueType.BOOL)

    def text(self, key: str, value: str) -> None:
        """Set a string. Raises `ConvertError` if it is not Unicode: JSON can hold halves of surrogate pairs."""
        _check_unicode(key, value)
        self[key] = MetaValue(value, GGUFValueType.STRING)

    def array(self, key: str, values: list[Any], item: GGUFValueType) -> None:
        """Set an array; GGUF has no use for an empty one, so that is left out."""
        if item == GGUFValueType.STRING:
            _check_unicode(key, "\n".join(values))
        if values:
            self[key] = MetaValue(values, GGUFValueType.ARRAY, item)


def _check_unicode(key: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConvertError(
            f"the text for {key!r} in the tokenizer files is not Unicode: {text[error.start]!r} stands alone there"
        ) from None


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One GGUF tensor: `shape` slowest axis first, `sources` in order (one, or one per expert of a stack)."""

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    sources: tuple[Source, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in the file."""
        block, size = GGML_QUANT_SIZES[self.qtype]
        return prod(self.shape) // block * size


@dataclass(slots=True)
class Options:
    """The user's choices; types are GGUF types or None for the default. `note` receives remarks for the user."""

    outtype: GGMLQuantizationType | None = None
    head: GGMLQuantizationType | None = None
    embedding: GGMLQuantizationType | None = None
    tap_convention: str = "after"
    allow_inexact: bool = False
    note: Callable[[str], None] = field(default=lambda text: None)


@dataclass(slots=True)
class Plan:
    """Everything that goes into one GGUF file."""

    arch: str
    metadata: Metadata
    tensors: list[PlannedTensor]
