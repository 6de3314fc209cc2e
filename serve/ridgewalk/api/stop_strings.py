"""Stop strings, found across tokens (Aho and Corasick, CACM 18(6), 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """All stop strings of a request in one automaton; immutable, shared by the request's sequences.

    A state is the longest suffix of the text so far that begins a stop string: its depth is what must be held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops`` must not contain the empty string."""
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]
        self.match: list[str | None] = [None]  # the longest stop string that ends in this state
        for stop in stops:
            state = 0
            for char in stop:
                state = self._next[state].setdefault(char, len(self.depth))
                if state == len(self.depth):
                    self._add_state()
            self.match[state] = stop
        self._link()

    def _add_state(self) -> None:
        self._next.append({})
        self._fail.append(0)
        self.depth.append(0)
        self.match.append(None)

    def _link(self) -> None:
        queue = deque([0])
        while queue:
            state = queue.popleft()
            for char, child in self._next[state].items():
                self.depth[child] = self.depth[state] + 1
                self._fail[child] = self.step(self._fail[state], char) if state else 0
                if self.match[child] is None:
                    self.match[child] = self.match[self._fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)


class StopStringFilter:
    """Cuts one sequence's text at the first stop string; holds back only what may be the start of one."""

    def __init__(self, automaton: StopAutomaton, include_in_output: bool = False) -> None:
        self._automaton = automaton
        self._include = include_in_output
        self._state = 0
        self._held = ""
        self.matched: str | None = None  # the stop string that was seen

    def push(self, text: str, may_stop: bool = True) -> str:
        """What of the text may be shown now. ``may_stop=False``: a stop string that ends in `text` does not count."""
        if self.matched is not None:
            return ""
        automaton, state, held = self._automaton, self._state, len(self._held)
        whole = self._held + text
        for position, char in enumerate(text, start=held + 1):
            state = automaton.step(state, char)
            stop = automaton.match[state]
            if stop is not None and may_stop:
                self.matched, self._held = stop, ""
                return whole[: position if self._include else position - len(stop)]
        self._state = state
        cut = len(whole) - automaton.depth[state]
        self._held = whole[cut:]
        return whole[:cut]

    def flush(self) -> str:
        """The end of the text: what was held back began no stop string after all."""
        held, self._held = self._held, ""
        return held
