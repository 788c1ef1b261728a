"""The one exception type of the converter."""

from __future__ import annotations

from collections.abc import Iterable


class ConvertError(ValueError):
    """A checkpoint, an option or an output path that cannot be converted.

    The message is one text for a person: it names the file, tensor or key, what was expected, what was found,
    and a way out.
    """


def fetch_again(start: bytes) -> str:
    """What to do about a damaged file that begins with `start`: a clone without Git LFS leaves pointers."""
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file; run 'git lfs pull' in the checkpoint folder"
    return "fetch it again"


def listing(names: Iterable[str], limit: int = 6) -> str:
    """Return the first `limit` names, quoted and comma-separated, and how many more there are."""
    items = list(names)
    text = ", ".join(repr(name) for name in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"
