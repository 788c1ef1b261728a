"""Stop strings over a stream of text pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces.

    Text that may be the beginning of a stop string is held back until it is decided, so nothing that is
    released ever has to be taken back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string found, or None."""

    def push(self, text: str) -> str:
        """Takes new text and returns what may be shown. After a match the rest is dropped."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        # The earliest place wins; of several stops there, the longest.
        found = [(at, -len(s), s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            at, _, self.matched = min(found)
            out, self._held = self._held[:at], ""
            return out
        keep = self._pending()
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        out, self._held = self._held, ""
        return out

    def _pending(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        held = self._held
        longest = min(len(held), max(len(s) for s in self._stops) - 1)
        for n in range(longest, 0, -1):
            tail = held[-n:]
            if any(s.startswith(tail) for s in self._stops):
                return n
        return 0
