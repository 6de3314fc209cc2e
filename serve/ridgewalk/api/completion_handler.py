"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ridgewalk.api.backend import Sequence, ServedModel, TokenEvent, TokenStream
from ridgewalk.api.body import decode_body, read_body
from ridgewalk.api.completion_protocol import (
    DEFAULT_MAX_TOKENS,
    MAX_SEQUENCES,
    CompletionRequest,
    check_completion_request,
    prompts,
)
from ridgewalk.api.completion_reply import CompletionWriter
from ridgewalk.api.errors import ApiError
from ridgewalk.api.generation import Generation
from ridgewalk.api.http import new_request_id
from ridgewalk.api.output import OutputOptions
from ridgewalk.api.reply import GenerationReply
from ridgewalk.api.sampling_fields import output_limit, sampling_params
from ridgewalk.api.service import Service, encode_all
from ridgewalk.api.slo_headers import requested_slo
from ridgewalk.api.stop_strings import StopAutomaton
from ridgewalk.routing.latency_slo import LatencySlo


class CompletionHandler:
    """Continues prompts, without chat template and without parting reasoning from content."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoder = msgspec.json.Decoder(CompletionRequest)

    async def handle(self, request: Request) -> Response:
        """Raises `ApiError`."""
        service = self._service
        started = service.clock()
        call = decode_body(self._decoder, await read_body(request, service.max_body_bytes))
        model = service.model(request, call.model)
        check_completion_request(call, model)
        asked = prompts(call, model)
        n = call.n or 1
        if len(asked) * n > MAX_SEQUENCES:
            raise ApiError(
                f"{len(asked)} prompts with n={n} are {len(asked) * n} sequences; the limit is {MAX_SEQUENCES}.",
                param="prompt",
            )
        prompt_ids = await _token_ids(model, asked, call.add_special_tokens is not False)
        stops = call.stop_strings
        slo = requested_slo(request.headers, model.slo)
        generation = Generation(
            _PromptsOnly() if call.max_tokens == 0 else service.backend,
            model,
            new_request_id(request, "cmpl-"),
            [sequence for ids in prompt_ids for sequence in _sequences(call, model, ids, slo)],
            n,
            OutputOptions(
                skip_special_tokens=call.skip_special_tokens is not False,
                stop=StopAutomaton(stops) if stops else None,
                include_stop=call.include_stop_str_in_output is True,
                continues_prompt=True,
            ),
            observer=service.observer,
            clock=service.clock,
            started=started,
        )
        options = call.stream_options
        writer = CompletionWriter(
            generation,
            int(service.wall_clock()),
            echo=[p if isinstance(p, str) else model.tokenizer.decode(p) for p in asked] if call.echo else None,
            logprobs=call.logprobs is not None,
            token_ids=call.return_token_ids is True,
            usage=options is not None and options.include_usage is True,
            continuous_usage=options is not None and options.continuous_usage_stats is True,
        )
        service.observer.on_request(model.name, request.url.path)
        return GenerationReply(generation, writer, stream=call.stream is True, open_replies=service.open_replies)


class _PromptsOnly:
    """Where ``max_tokens: 0`` generates: every sequence ends as it begins."""

    def generate(self, model: str, request_id: str, sequences: list[Sequence]) -> TokenStream:
        return _Ended(len(sequences))


class _Ended:
    """The stream of sequences without tokens."""

    def __init__(self, num_sequences: int) -> None:
        self._events = [TokenEvent(index, [], finish_reason="length") for index in range(num_sequences)]

    async def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        yield self._events

    def finish(self, index: int, reason: str) -> None:
        """All have ended."""

    async def aclose(self) -> None:
        """Nothing runs."""


async def _token_ids(model: ServedModel, asked: list[str | list[int]], add_special_tokens: bool) -> list[list[int]]:
    texts = [prompt for prompt in asked if isinstance(prompt, str)]
    encoded = iter(await encode_all(model.tokenizer, texts, add_special_tokens))
    token_ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in asked]
    if not all(token_ids):
        raise ApiError("The prompt has no tokens.", param="prompt", code="invalid_value")
    return token_ids


def _sequences(call: CompletionRequest, model: ServedModel, prompt_ids: list[int], slo: LatencySlo) -> list[Sequence]:
    limit = output_limit(model, len(prompt_ids), call.max_tokens, DEFAULT_MAX_TOKENS, "prompt", "max_tokens")
    return [Sequence(prompt_ids, params, slo) for params in sampling_params(call, model, limit, call.logprobs)]
