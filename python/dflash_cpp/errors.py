"""The package's exceptions, in one place for `except` clauses."""

from __future__ import annotations

from ._core import CapacityError, DFlashError

__all__ = ["CapacityError", "DFlashError"]
