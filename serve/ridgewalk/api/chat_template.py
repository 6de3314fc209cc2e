"""Chat templates: the jinja2 program that a model ships to turn messages into its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

RESERVED_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "self"}
)
"""Names that ``chat_template_kwargs`` may not take."""


class ChatTemplateError(ValueError):
    """The template is broken, or it refused the messages; the message is a sentence."""


class ChatTemplate:
    """A compiled template. It renders as ``transformers``' ``apply_chat_template`` does, in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """``special_tokens``: variables such as ``bos_token``. Raises `ChatTemplateError` if ``source`` is broken."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"The chat template cannot be compiled: {error}.") from error

    def knows_role(self, role: str) -> bool:
        """Whether the template mentions a role by name."""
        return f"'{role}'" in self.source or f'"{role}"' in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for these messages; ``extra`` are further variables (``enable_thinking`` and the like).

        Raises `ChatTemplateError` with the template's own words when it refuses them, and whenever it fails: what it is
        given comes from a client.
        """
        variables = {**self._special_tokens, **(extra or {})}
        variables |= {"messages": messages, "tools": None, "documents": None}
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return self._template.render(variables)
        except _Refused as error:
            raise ChatTemplateError(str(error)) from error
        except Exception as error:  # any operation on a client's values may fail in any way
            raise ChatTemplateError(f"The chat template failed on these messages: {error}") from error


class _Refused(jinja2.TemplateError):
    """A template called ``raise_exception``."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what the assistant said, for training: here just its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's way)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own ``tojson`` escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
