"""Stop tokens and stop strings: when a row ends, and what of its text is shown."""

from __future__ import annotations

from collections.abc import Callable


class StopWatch:
    """Says which rows end: behind any of the tokens `ids`, or behind the one that completes any of `strings`.

    `decode` turns token ids into text; it is needed for strings only.
    """

    def __init__(
        self, ids: frozenset[int], strings: tuple[str, ...], rows: int, decode: Callable[[list[int]], str] | None
    ) -> None:
        self.ids = ids
        self.strings = strings
        self.decode = decode
        self.said: list[list[int]] = [[] for _ in range(rows)]

    def ended(self, row: int, token: int) -> bool:
        """Whether `token`, the next of `row`, ends it."""
        if token in self.ids:
            return True
        if not self.strings or self.decode is None:
            return False
        self.said[row].append(token)
        # A token stands for at least one byte, so a string that this token completes lies within so many of them.
        tail = max(len(stop.encode()) for stop in self.strings)
        text = self.decode(self.said[row][-tail:])
        return any(stop in text for stop in self.strings)


class UntilStop:
    """Passes text on up to the first stop string, holding back what may turn out to be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""

    def put(self, piece: str) -> str:
        self.held += piece
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            cut = min(found)
        else:
            ends = range(1, len(self.held) + 1)
            cut = len(self.held) - max((n for n in ends if self._may_begin(self.held[-n:])), default=0)
        sent, self.held = self.held[:cut], self.held[cut:]
        return sent

    def end(self) -> str:
        """What was held back, unless it is a stop string."""
        return "" if any(stop in self.held for stop in self.stops) else self.held

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self.stops)
