"""Typed access to config.json and its companions, with errors that name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConvertError, fetch_again


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`. Raises `ConvertError` if it is absent, not JSON, or not an object."""
    return parse_json_object(path, read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Read a whole file. Raises `ConvertError` if that is not possible."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_json_object(path: Path, content: bytes) -> dict[str, Any]:
    """The object that `content`, read from `path`, holds as JSON. Raises `ConvertError` for anything else."""
    try:
        document = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: not valid JSON ({error}): {fetch_again(content)}") from error
    if not isinstance(document, dict):
        raise ConvertError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


class Config:
    """A JSON object that remembers its file. A null value counts as absent, as in transformers."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self.prefix = prefix

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read `path`, which must exist."""
        return cls(path, read_json(path))

    @classmethod
    def load_optional(cls, path: Path) -> Config:
        """Read `path`, or return an empty object if there is no such file."""
        return cls.load(path) if path.exists() else cls(path, {})

    def error(self, key: str, expected: str, way_out: str = "") -> ConvertError:
        """Return the error for a key with a wrong or missing value."""
        found = f"found {self.values[key]!r}" if key in self.values else "the key is missing"
        return ConvertError(
            f"{self.path}: {self.prefix}{key}: expected {expected}, {found}{way_out and '. ' + way_out}"
        )

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def section(self, key: str) -> Config:
        """Return a nested object, empty if absent."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Config(self.path, value, f"{self.prefix}{key}.")

    def opt_int(self, key: str, low: int = 1, high: int = 2**31 - 1) -> int | None:
        """Return an integer in [low, high], or None if absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def integer(self, key: str, low: int = 1, high: int = 2**31 - 1) -> int:
        """Return an integer in [low, high]."""
        value = self.opt_int(key, low, high)
        if value is None:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def opt_float(self, key: str) -> float | None:
        """Return a finite positive number, or None if absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 < value < 3.4e38:
            raise self.error(key, "a positive number")
        return float(value)

    def number(self, key: str) -> float:
        """Return a finite positive number."""
        value = self.opt_float(key)
        if value is None:
            raise self.error(key, "a positive number")
        return value

    def opt_bool(self, key: str) -> bool | None:
        """Return a boolean, or None if absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def opt_ints(self, key: str) -> list[int] | None:
        """Return a non-empty list of integers, or None if absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
            raise self.error(key, "a non-empty list of integers")
        return value

    def names(self, key: str) -> list[str]:
        """Return the strings of a list, without anything else; empty if there is no list."""
        value = self.values.get(key)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    def opt_str(self, key: str) -> str | None:
        """Return a string, or None if absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value
