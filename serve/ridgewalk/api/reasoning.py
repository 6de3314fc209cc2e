"""Parts a reasoning model's output into what it thought and what it answers."""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import NamedTuple

REASONING_TAGS = ("<think>", "</think>")


class SplitText(NamedTuple):
    """A piece of output, parted."""

    reasoning: str
    content: str


class _Part(Enum):
    START = "start"  # nothing but whitespace so far: the opening tag may still come
    REASONING = "reasoning"
    CONTENT = "content"


class ReasoningSplitter:
    """One sequence's text, parted as it comes.

    One block of reasoning, at the beginning: a tag that the answer itself mentions is text. Newlines next to the tags,
    inside and after the block, are dropped. Held back is only what may be part of a tag, or newlines that may precede
    the closing one. Output that ends before ``</think>`` is all reasoning.
    """

    def __init__(self, prompt: str = "", tags: tuple[str, str] = REASONING_TAGS) -> None:
        """``prompt``: the rendered chat. If it ends with an open tag, the output begins inside the block; some models
        then open it once more, which is dropped."""
        self._open, self._close = tags
        self._held = ""
        self._position = 0  # characters of output before `_held`
        self._trim = False  # newlines that come next are dropped
        self._part = _Part.START
        self.span: tuple[int, int | None] | None = None  # where reasoning begins and ends, in characters of output
        self._begins_inside = prompt.rstrip().endswith(self._open)
        if self._begins_inside:
            self._trim, self.span = True, (0, None)

    @property
    def decided(self) -> int:
        """Characters of output of which it is known on which side of ``span`` they are."""
        if self._part is _Part.REASONING:
            return self._position + len(self._held) - self._partial_tag(self._held, self._close)
        return self._position

    def push(self, text: str) -> SplitText:
        """Part the next piece of text."""
        self._held += text
        if self._part is _Part.START:
            self._leave_start()
        match self._part:
            case _Part.START:
                return SplitText("", "")
            case _Part.REASONING:
                return self._reasoning()
            case _Part.CONTENT:
                return SplitText("", self._content())

    def flush(self) -> SplitText:
        """The end of the output: what was held back is no tag."""
        is_reasoning = self._part is _Part.REASONING or (self._part is _Part.START and self._begins_inside)
        if is_reasoning:
            self._drop_newlines()
        held = self._take(len(self._held))
        return SplitText(held, "") if is_reasoning else SplitText("", held)

    def _enter_reasoning(self, position: int) -> None:
        self._part, self._trim, self.span = _Part.REASONING, True, (position, None)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._position += count
        return taken

    def _leave_start(self) -> None:
        """Decide whether the output begins with the opening tag, once it can be told."""
        begun = self._held.lstrip()
        if begun.startswith(self._open):
            self._take(len(self._held) - len(begun) + len(self._open))
            self._enter_reasoning(self._position)
        elif not self._open.startswith(begun):
            self._part = _Part.REASONING if self._begins_inside else _Part.CONTENT

    def _reasoning(self) -> SplitText:
        self._drop_newlines()
        end = self._held.find(self._close)
        if end < 0:
            partial = self._partial_tag(self._held, self._close)
            body = self._held[: len(self._held) - partial].rstrip("\n")
            return SplitText(self._take(len(body)), "")
        reasoning = self._take(end).rstrip("\n")
        self.span = (self.span[0] if self.span else 0, self._position)
        self._take(len(self._close))
        self._part, self._trim = _Part.CONTENT, True
        return SplitText(reasoning, self._content())

    def _content(self) -> str:
        self._drop_newlines()
        return self._take(len(self._held))

    def _drop_newlines(self) -> None:
        if self._trim and self._held:
            self._take(len(self._held) - len(self._held.lstrip("\n")))
            self._trim = not self._held

    @staticmethod
    def _partial_tag(text: str, tag: str) -> int:
        """Length of the longest end of ``text`` that begins ``tag``."""
        for length in range(min(len(tag) - 1, len(text)), 0, -1):
            if text.endswith(tag[:length]):
                return length
        return 0


class ReasoningCounter:
    """Counts the tokens of reasoning: those that begin after the opening tag and before the closing one."""

    def __init__(self, splitter: ReasoningSplitter, tag_ids: frozenset[int]) -> None:
        """``tag_ids``: the tags' own tokens, if they have any; never counted."""
        self._splitter = splitter
        self._tag_ids = tag_ids
        self._undecided: deque[int] = deque()  # where tokens begin, in characters of output
        self.count = 0

    def add(self, token_id: int, start: int) -> None:
        """A token that begins ``start`` characters into the output."""
        if token_id not in self._tag_ids:
            self._undecided.append(start)

    def settle(self, final: bool = False) -> None:
        """Count what has become certain; ``final``: the output is complete, so all is."""
        decided = self._splitter.decided
        while self._undecided and (final or self._undecided[0] < decided):
            if self._is_inside(self._undecided.popleft()):
                self.count += 1

    def _is_inside(self, start: int) -> bool:
        span = self._splitter.span
        return span is not None and span[0] <= start and (span[1] is None or start < span[1])
