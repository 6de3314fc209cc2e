"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ridgewalk.api.backend import Sequence, ServedModel
from ridgewalk.api.body import decode_body, read_body
from ridgewalk.api.chat_protocol import (
    ChatMessage,
    ChatRequest,
    check_chat_request,
    check_template_kwargs,
    template_messages,
)
from ridgewalk.api.chat_reply import ChatWriter
from ridgewalk.api.chat_template import ChatTemplateError
from ridgewalk.api.errors import ApiError
from ridgewalk.api.generation import Generation
from ridgewalk.api.http import new_request_id
from ridgewalk.api.output import OutputOptions
from ridgewalk.api.reply import GenerationReply
from ridgewalk.api.sampling_fields import output_limit, sampling_params
from ridgewalk.api.service import Service, encode_all, off_loop
from ridgewalk.api.slo_headers import requested_slo
from ridgewalk.api.stop_strings import StopAutomaton
from ridgewalk.api.thinking_budget import thinking_budget


class ChatHandler:
    """Turns a conversation into a prompt and answers it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._decoder = msgspec.json.Decoder(ChatRequest)

    async def handle(self, request: Request) -> Response:
        """Raises `ApiError`."""
        service = self._service
        started = service.clock()
        call = decode_body(self._decoder, await read_body(request, service.max_body_bytes))
        model = service.model(request, call.model)
        check_chat_request(call, model)
        prompt = await render_chat(
            model, call.messages, call.add_generation_prompt is not False, _template_variables(call)
        )
        (prompt_ids,) = await encode_all(model.tokenizer, [prompt], call.add_special_tokens is True)
        if not prompt_ids:
            raise ApiError("The prompt has no tokens.", param="messages")
        limit = output_limit(model, len(prompt_ids), call.output_limit, None, "messages", _limit_param(call))
        slo = requested_slo(request.headers, model.slo)
        budget = thinking_budget(call, model, limit, prompt)
        sampling = sampling_params(call, model, limit, call.num_logprobs, budget, call.reasoning_effort or "")
        stops = call.stop_strings
        generation = Generation(
            service.backend,
            model,
            new_request_id(request, "chatcmpl-"),
            [Sequence(prompt_ids, params, slo) for params in sampling],
            len(sampling),
            OutputOptions(
                skip_special_tokens=call.skip_special_tokens is not False,
                stop=StopAutomaton(stops) if stops else None,
                include_stop=call.include_stop_str_in_output is True,
                reasoning_tags=model.reasoning_tags,
            ),
            prompt=prompt,
            observer=service.observer,
            clock=service.clock,
            started=started,
        )
        options = call.stream_options
        writer = ChatWriter(
            generation,
            int(service.wall_clock()),
            logprobs=call.logprobs is True,
            token_ids=call.return_token_ids is True,
            usage=options is not None and options.include_usage is True,
            continuous_usage=options is not None and options.continuous_usage_stats is True,
        )
        service.observer.on_request(model.name, request.url.path)
        return GenerationReply(generation, writer, stream=call.stream is True, open_replies=service.open_replies)


async def render_chat(
    model: ServedModel, messages: list[ChatMessage], add_generation_prompt: bool, extra: dict[str, Any] | None
) -> str:
    """The prompt text for a conversation. Raises `ApiError`."""
    template = model.chat_template
    if template is None:
        raise ApiError(f"Model {model.name} has no chat template: use /v1/completions.", param="messages")
    check_template_kwargs(extra)
    plain = template_messages(messages, template)
    try:
        return await off_loop(
            lambda: template.render(plain, add_generation_prompt, extra),
            sum(len(message["content"]) for message in plain) + 40 * len(plain),
        )
    except ChatTemplateError as error:
        raise ApiError(str(error), param="messages", code="chat_template_error") from error


def _template_variables(call: ChatRequest) -> dict[str, Any]:
    """``reasoning_effort`` is for the template, if it knows the word; ``chat_template_kwargs`` goes before it."""
    effort = {} if call.reasoning_effort is None else {"reasoning_effort": call.reasoning_effort}
    return effort | (call.chat_template_kwargs or {})


def _limit_param(call: ChatRequest) -> str:
    return "max_tokens" if call.max_completion_tokens is None else "max_completion_tokens"
