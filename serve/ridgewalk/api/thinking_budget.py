"""How long a chat may think: ``reasoning_effort`` and ``max_reasoning_tokens`` as a budget that the sampler keeps."""

from __future__ import annotations

from ridgewalk.api.backend import ServedModel
from ridgewalk.api.chat_protocol import ChatRequest
from ridgewalk.api.errors import ApiError
from ridgewalk.engine.sampling import ReasoningBudget

EFFORT_SHARES = {"low": 0.2, "medium": 0.5, "high": 0.8}
"""Of a request's output limit, what it may think: the rest is left for the answer."""


def thinking_budget(call: ChatRequest, model: ServedModel, output_limit: int, prompt: str) -> ReasoningBudget | None:
    """The budget of a chat, None when it asked for none; of two limits the smaller.

    ``prompt``: the rendered chat. A template that takes ``reasoning_effort`` itself may serve a model without tags: the
    word is then the template's alone.

    Raises `ApiError` when the model has no token that ends its thinking.
    """
    effort, limit = call.reasoning_effort, call.max_reasoning_tokens
    if effort is None and limit is None:
        return None
    tags = model.reasoning_tags or ("", "")
    opens, closes = (model.tokenizer.token_id(tag) for tag in tags)
    if opens is None or closes is None or max(opens, closes) >= model.vocab_size:
        if limit is None and model.chat_template is not None and "reasoning_effort" in model.chat_template.source:
            return None
        field = "reasoning_effort" if limit is None else "max_reasoning_tokens"
        raise ApiError(
            f"Model {model.name} has no token that ends its thinking, so `{field}` cannot limit it; leave it out.",
            param=field,
            code="unsupported_parameter",
        )
    limits = [limit] if limit is not None else []
    if effort is not None:
        limits.append(int(output_limit * EFFORT_SHARES[effort]))
    return ReasoningBudget(min(limits), opens, closes, begins_open=prompt.rstrip().endswith(tags[0]))
