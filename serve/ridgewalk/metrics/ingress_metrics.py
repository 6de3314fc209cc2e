"""`IngressMetrics`: what one ingress records of the requests that clients see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from ridgewalk.metrics import catalogue
from ridgewalk.metrics.families import CounterFamily, HistogramFamily
from ridgewalk.metrics.snapshot import encode, relabeled, take_snapshot

_ENDPOINTS = {"/v1/chat/completions": "chat_completions", "/v1/completions": "completions"}


class IngressMetrics(Collector):
    """Implements `api.observer.RequestObserver`, and counts routing decisions.

    ``ingress`` is Serve's rank of the ingress replica, ``current_rank`` gives the one that it has now. It is a label of
    its own: were counters of several ingresses summed under equal labels, the sum would fall when one restarts,
    which Prometheus takes for a reset to zero and counts all the others' totals again. ``model_names`` have series
    from the start, so that rates see the first event.
    """

    def __init__(
        self, ingress: str, model_names: Iterable[str] = (), current_rank: Callable[[], str] | None = None
    ) -> None:
        self._ingress = ingress
        self._current_rank = current_rank or (lambda: ingress)
        self._first_token = self._histogram(catalogue.TIME_TO_FIRST_TOKEN)
        self._inter_token = self._histogram(catalogue.INTER_TOKEN_LATENCY)
        self._e2e = self._histogram(catalogue.E2E_REQUEST_LATENCY)
        self._prompt_tokens = self._histogram(catalogue.REQUEST_PROMPT_TOKENS)
        self._generation_tokens = self._histogram(catalogue.REQUEST_GENERATION_TOKENS)
        self._requests = CounterFamily(catalogue.REQUESTS, ())
        self._success = CounterFamily(catalogue.REQUEST_SUCCESS, ())
        self._errors = CounterFamily(catalogue.REQUEST_ERRORS, ())
        self._routing = CounterFamily(catalogue.ROUTING_DECISIONS, ())
        self._scrapes = CounterFamily(catalogue.SCRAPES, ())
        self._scrapes.add((ingress,), 0)
        for model in model_names:
            self._start_at_zero(model)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # -- RequestObserver --------------------------------------------------------------------------------------------

    def on_request(self, model: str, endpoint: str) -> None:
        """A request for tokens goes to the backend; ``endpoint`` is its path."""
        self._requests.add((model, self._ingress, _endpoint(endpoint)))

    def on_first_token(self, model: str, seconds: float) -> None:
        """The request's first token came, ``seconds`` after its headers."""
        self._first_token.observe((model, self._ingress), seconds)

    def on_tokens(self, model: str, seconds: float, count: int) -> None:
        """``count`` further tokens of one sequence came together: each is taken to have taken its share of the time."""
        self._inter_token.observe((model, self._ingress), seconds / count, count)

    def on_finish(
        self, model: str, finish_reason: str, seconds: float, prompt_tokens: int, generation_tokens: int
    ) -> None:
        """One sequence ended; ``prompt_tokens`` is 0 when another sequence of the same prompt counts them."""
        labels = (model, self._ingress)
        self._e2e.observe(labels, seconds)
        self._generation_tokens.observe(labels, generation_tokens)
        if prompt_tokens:
            self._prompt_tokens.observe(labels, prompt_tokens)
        self._success.add((*labels, finish_reason if finish_reason in catalogue.FINISH_REASONS else "other"))

    def on_error(self, model: str, status: int) -> None:
        """A request ended in an error; 499 when the client left."""
        self._errors.add((model, self._ingress, str(status) if 400 <= status <= 599 else "other"))

    # -- the router -------------------------------------------------------------------------------------------------

    def on_routed(self, model: str, placement: str, reason: str) -> None:
        """A request was sent to a replica of ``placement``; ``reason`` is one of the router's enumeration."""
        self._routing.add((model, self._ingress, placement, reason))

    # -- the scrape -------------------------------------------------------------------------------------------------

    def on_scrape(self) -> None:
        """A scrape is being answered; asking it what another ingress needs for one is none."""
        self._scrapes.add((self._ingress,))

    # -- on any thread ----------------------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Everything recorded, encoded for `exposition.merge`."""
        snapshot, rank = take_snapshot(self.registry), self._current_rank()
        return encode(snapshot if rank == self._ingress else relabeled(snapshot, "ingress", rank))

    def collect(self) -> Iterator[Metric]:
        """The metrics now, for the registry."""
        for family in (
            self._first_token,
            self._inter_token,
            self._e2e,
            self._prompt_tokens,
            self._generation_tokens,
            self._requests,
            self._success,
            self._errors,
            self._routing,
            self._scrapes,
        ):
            yield family.collect()

    def _histogram(self, spec: catalogue.MetricSpec) -> HistogramFamily:
        return HistogramFamily(spec, ())

    def _start_at_zero(self, model: str) -> None:
        labels = (model, self._ingress)
        for histogram in (
            self._first_token,
            self._inter_token,
            self._e2e,
            self._prompt_tokens,
            self._generation_tokens,
        ):
            histogram.observe(labels, 0.0, times=0)
        for endpoint in _ENDPOINTS.values():
            self._requests.add((*labels, endpoint), 0)
        for reason in ("stop", "length"):
            self._success.add((*labels, reason), 0)


def _endpoint(path: str) -> str:
    """By the end of the path: a service may be mounted below a prefix."""
    return next((name for ending, name in _ENDPOINTS.items() if path.endswith(ending)), "other")
