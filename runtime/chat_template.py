"""The checkpoint's chat template in its sandbox, rendered as transformers renders it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

RENDER_SECONDS = 2.0
"""A template takes well under a millisecond; one that takes this long will not end."""
MAX_RENDERED_CHARACTERS = 1 << 24
_DEADLINE = "the deadline"
"""Among the variables, under a name that no template can spell."""


class ChatTemplate:
    """A compiled chat template; safe to share between threads.

    What repeats itself in a template (loops, macros, blocks) ends with the time that a rendering may take. A single
    expression does not: who multiplies strings or raises powers to make a huge one keeps its thread until it is there.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], seconds: float = RENDER_SECONDS) -> None:
        """Compile `source`; `variables` are what it sees beside the messages, `seconds` is the most that it may take.

        Raises:
            jinja2.TemplateError: the source is not a template.
        """
        self._template = _environment().from_string(source)
        self._variables, self._seconds = dict(variables), seconds

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt up to the point where the answer begins.

        Args:
            messages: `role` ("system", "user" or "assistant") and `content` of each.

        Raises:
            jinja2.TemplateError: the template refuses the messages, fails, or takes too long.
        """
        deadline = _Deadline(self._seconds)
        variables = {"messages": list(messages), "add_generation_prompt": True, "range": deadline.range}
        variables[_DEADLINE] = deadline
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(**(self._variables | variables)):
                deadline.check()
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS:
                    raise jinja2.TemplateRuntimeError(f"it writes more than {MAX_RENDERED_CHARACTERS} characters")
        except jinja2.TemplateError:
            raise
        except Exception as error:  # a template can raise whatever its expressions do, a TypeError or a RecursionError
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        return "".join(pieces)


class _Deadline:
    """Ends a rendering that takes too long; looked at wherever the template writes, counts or repeats itself."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def check(self) -> None:
        """Raise TemplateRuntimeError if it is over."""
        if time.monotonic() > self._end:
            raise jinja2.TemplateRuntimeError(f"it takes more than {self._seconds:g} s")

    def range(self, *bounds: int) -> Iterator[int]:
        """`range` within the sandbox's limit."""
        numbers = range(*bounds)
        if len(numbers) > MAX_RANGE:
            raise jinja2.TemplateRuntimeError(f"it counts over {len(numbers)} numbers, more than {MAX_RANGE}")
        for number in numbers:
            self.check()
            yield number


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, whose templates look at the deadline whenever they repeat something.

    Compiled templates give no other hook: a loop runs in plain Python, and one that writes nothing, or a macro that
    calls itself twice, is at work for ages between two pieces of `generate`.
    """

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        """Compile with a look at the deadline at the head of all that can run more than once."""
        repeated: tuple[type[nodes.For | nodes.Macro | nodes.Block], ...] = (nodes.For, nodes.Macro, nodes.Block)
        look = nodes.Call(nodes.EnvironmentAttribute("in_time"), [nodes.ContextReference()], [], None, None)
        for node in source.find_all(repeated):
            node.body.insert(0, nodes.ExprStmt(look))
        return super()._generate(source, *args, **options)

    @staticmethod
    def in_time(context: Context) -> None:
        """Look at the deadline; called as an attribute of the environment, which nothing that a template sets hides."""
        context[_DEADLINE].check()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the model's words for training: rendered as what it holds."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the library)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, **options: Any) -> str:
    """JSON as it is read by a model: without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, **({"ensure_ascii": False} | options))
