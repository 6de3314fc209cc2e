"""The server under load: which model it serves, whether it is a Ridgewalk, and what its chat template costs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp
import httpx
import msgspec
from tokenizers import Tokenizer

from ridgewalk.bench.prompts import count_tokens, write_prompts
from ridgewalk.config import ConfigError
from ridgewalk.load.scrape import Scrape
from ridgewalk.load.streaming_client import Answer, RequestFailed, stream_completion
from ridgewalk.metrics import catalogue

TIMEOUT_S = 30.0
WARM_UP_REQUESTS = 4
WARM_UP_TOKENS = 8
HINT = "; --no-force-lengths leaves ignore_eos out"


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


@dataclass(frozen=True)
class Endpoint:
    """A server that answered, and one of its models."""

    url: str  # without /v1
    model: str
    max_model_len: int | None
    api_key: str | None
    is_ridgewalk: bool
    version: str | None
    placement: str | None  # names of the model's placements, joined by +

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def find_endpoint(url: str, model: str | None, api_key: str | None) -> Endpoint:
    """Ask the server at ``url`` for its models and its metrics.

    Raises:
        ConfigError: nobody answers, the key is refused, or the model is not there; names the flag.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        url = f"http://{url}"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(timeout=TIMEOUT_S, headers=headers) as client:
        card = _choose(_models(client, url), model, url)
        scrape = _ridgewalk_metrics(client, url)
    return Endpoint(
        url=url,
        model=card.id,
        max_model_len=card.max_model_len,
        api_key=api_key,
        is_ridgewalk=scrape is not None,
        version=_label(scrape, catalogue.BUILD_INFO.name, "version"),
        placement=_label(scrape, catalogue.PLACEMENT_INFO.name, "placement", model_name=card.id),
    )


def warm_up(endpoint: Endpoint, tokenizer: Tokenizer, seed: int, *, force: bool) -> int:
    """Send a few short requests, so that nothing is done for the first time under load.

    Args:
        force: ask for outputs of exact length, as the load will.

    Returns:
        Tokens that the server counts for a prompt beyond the tokens of its text: its chat template.

    Raises:
        ConfigError: the model does not answer, or counts no tokens.
    """
    texts = write_prompts(tokenizer, [32] * WARM_UP_REQUESTS, seed=seed + 1_000_003)  # not the prompts of the load
    try:
        answers = asyncio.run(_ask(endpoint, texts, {"ignore_eos": True} if force else {}))
    except (RequestFailed, aiohttp.ClientError, TimeoutError, asyncio.TimeoutError) as error:
        raise ConfigError(
            f"--url: {endpoint.url} refused a streamed chat completion of {endpoint.model!r}: "
            f"{error or type(error).__name__}" + (HINT if force and "ignore_eos" in str(error) else "")
        ) from None
    counted = answers[0].prompt_tokens
    if not counted:
        raise ConfigError(f"--url: {endpoint.url} reports no usage in its streams, so tokens cannot be counted exactly")
    return max(0, counted - count_tokens(tokenizer, texts[0]))


async def _ask(endpoint: Endpoint, texts: list[str], fields: dict[str, object]) -> list[Answer]:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(headers=endpoint.headers, timeout=timeout) as session:

        def ask(text: str) -> asyncio.Future[Answer]:
            body = {
                "model": endpoint.model,
                "messages": [{"role": "user", "content": text}],
                "max_completion_tokens": WARM_UP_TOKENS,
                **fields,
            }
            return asyncio.ensure_future(stream_completion(session, f"{endpoint.url}/v1/chat/completions", body))

        return list(await asyncio.gather(*map(ask, texts)))


def _models(client: httpx.Client, url: str) -> list[_Card]:
    try:
        reply = client.get(f"{url}/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"--url: no server answers at {url} ({error or type(error).__name__}); start one, e.g. `ridgewalk serve "
            "demo-dense`, or name another"
        ) from None
    if reply.status_code in (401, 403):
        raise ConfigError(f"--api-key: {url} wants a key that it knows ({reply.status_code})")
    if reply.status_code == 503:
        raise ConfigError(f"--url: {url} is not ready yet (503); try again when it is")
    try:
        if reply.status_code != 200:
            raise ValueError(f"status {reply.status_code}")
        models = msgspec.json.decode(reply.content, type=_Models).data
    except ValueError as error:  # msgspec's errors are
        raise ConfigError(f"--url: {url}/v1/models is not a list of models as OpenAI's API has it ({error})") from None
    if not models:
        raise ConfigError(f"--url: {url} serves no model")
    return models


def _choose(models: list[_Card], wanted: str | None, url: str) -> _Card:
    names = ", ".join(card.id for card in models)
    if wanted is None:
        if len(models) > 1:
            raise ConfigError(f"--model: {url} serves several models; name one of {names}")
        return models[0]
    for card in models:
        if card.id == wanted:
            return card
    raise ConfigError(f"--model: {url} does not serve {wanted!r}; it serves {names}")


def _ridgewalk_metrics(client: httpx.Client, url: str) -> Scrape | None:
    try:
        reply = client.get(f"{url}/metrics")
        scrape = Scrape.parse(reply.text) if reply.status_code == 200 else None
    except (httpx.HTTPError, ValueError):  # another server's /metrics may be anything
        return None
    return scrape if scrape is not None and scrape.total(catalogue.BUILD_INFO.name) else None


def _label(scrape: Scrape | None, name: str, label: str, **labels: str) -> str | None:
    values = sorted(scrape.values_of(name, label, **labels)) if scrape is not None else []
    return "+".join(values) or None
