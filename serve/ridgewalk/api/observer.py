"""What the API layer tells whoever keeps metrics."""

from __future__ import annotations

from typing import Protocol


class RequestObserver(Protocol):
    """Called on the event loop, so it must be quick and must not raise. ``model`` is a served model's name, or empty
    when the request named none that is served: a client cannot invent labels."""

    def on_request(self, model: str, endpoint: str) -> None:
        """A request for tokens passed all checks and goes to the backend; ``endpoint`` is its path."""

    def on_first_token(self, model: str, seconds: float) -> None:
        """The request's first token came, ``seconds`` after its headers (time to first token)."""

    def on_tokens(self, model: str, seconds: float, count: int) -> None:
        """``count`` further tokens of one sequence came together, ``seconds`` after the ones before them."""

    def on_finish(
        self, model: str, finish_reason: str, seconds: float, prompt_tokens: int, generation_tokens: int
    ) -> None:
        """One sequence ended (``stop`` or ``length``), ``seconds`` after the request's headers. Of the sequences that
        share a prompt only the first counts its ``prompt_tokens``; the others say 0."""

    def on_error(self, model: str, status: int) -> None:
        """A request ended in an error, also within a stream; 499 when the client left."""


class NullObserver:
    """Keeps nothing."""

    def on_request(self, model: str, endpoint: str) -> None:
        """Nothing."""

    def on_first_token(self, model: str, seconds: float) -> None:
        """Nothing."""

    def on_tokens(self, model: str, seconds: float, count: int) -> None:
        """Nothing."""

    def on_finish(
        self, model: str, finish_reason: str, seconds: float, prompt_tokens: int, generation_tokens: int
    ) -> None:
        """Nothing."""

    def on_error(self, model: str, status: int) -> None:
        """Nothing."""
