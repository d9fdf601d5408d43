"""A Jinja sandbox in which a template's time and memory have limits.

Jinja's own sandbox keeps a template from the machine, not from its time: a line of it can write
gigabytes, or call itself for ever. Here all that a template does is counted: turns of loops, calls,
filters and operators, and the characters and items that they read and make. What large numbers
would make is known before it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import SecurityError

# Turns of loops, calls, filters, operators and pieces of output in a rendering, beside ten for each
# character that the template is given.
STEPS = 50_000
SIZE = 1 << 18  # characters or items of one value, beside twenty times what the template is given
WORK = 20  # times that size may be read and made in all
_ITEM = 16  # characters that an item counts as
_SOURCE = 1 << 20  # characters of a template
_METER = "(meter)"  # as here, no name that a template can write
_LOOP, _JOIN, _MADE, _READ, _WRITTEN = "(loop)", "(join)", "(made)", "(read)", "(written)"
# What is random, or takes a time that grows with the square of a text.
_REFUSED = ("lipsum", "pprint", "random", "urlize", "xmlattr")
# Filters and methods that look at no more than the items of a list or dictionary.
_SHALLOW = frozenset(
    (
        *("attr", "batch", "count", "d", "default", "first", "get", "items", "keys", "last"),
        *("length", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"),
        *("slice", "values"),
    )
)
_WIDE = re.compile(r"\d{5,}|\*|\{[^{}]*\{")


class Meter:
    """What a rendering has used and may use; each method raises SecurityError beyond it."""

    def __init__(self, given: int) -> None:
        """`given` counts the characters that the template is given."""
        self.size = SIZE + 20 * given
        self._steps, self._work = STEPS + 10 * given, WORK * self.size

    def step(self, count: int = 1) -> None:
        """Counts steps."""
        self._steps -= count
        if self._steps < 0:
            raise SecurityError("it takes more steps than a conversation needs")

    def check(self, size: float) -> None:
        """A text or list of so many characters or items is to be made."""
        if size > self.size:
            raise SecurityError("it makes a text or list too large for a conversation")

    def check_numbers(self, values: Sequence[Any]) -> None:
        """Numbers are to be used, as widths or the like."""
        for value in values:
            if isinstance(value, int) and abs(value) > self.size:
                raise SecurityError("it computes with a number too large for a conversation")

    def work(self, size: int) -> int:
        """So many characters are read or made; gives their number."""
        self._work -= size
        if self._work < 0:
            raise SecurityError("it reads or makes more text than a conversation needs")
        return size

    def read(self, value: Any) -> int:
        """All of a value is read; gives the characters and items in it and in what it holds."""
        size, left = 0, [value]
        while left:
            one = left.pop()
            size += len(one) if isinstance(one, str | bytes) else _ITEM
            if isinstance(one, list | tuple | set):
                left += one
            elif isinstance(one, Mapping):
                left += [part for pair in one.items() for part in pair]
            elif isinstance(one, jinja2.utils.Namespace):
                raise SecurityError("it writes a namespace")
            self.check(size + len(left))
        return self.work(size)

    def made(self, value: Any) -> Any:
        """A step has made this value; gives it back."""
        self.step()
        if isinstance(value, str | list | tuple | dict):
            self.check(len(value))
            self.work(len(value) * (1 if isinstance(value, str) else _ITEM))
        elif isinstance(value, int) and value.bit_length() > 1000:
            raise SecurityError("it makes a number of hundreds of digits")
        return value


class _Generation(jinja2.ext.Extension):
    """Renders what is inside `{% generation %} ... {% endgeneration %}`, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of chat templates; `rendered` renders them."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, filters: Mapping[str, Callable]) -> None:
        """`filters` stand beside Jinja's own, or in their place."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        del self.globals["lipsum"]
        known = {name: run for name, run in FILTERS.items() if name not in _REFUSED}
        own = {_LOOP: _loop, _JOIN: _join, _MADE: _made, _READ: _read, _WRITTEN: _written}
        counted = {name: _counted(name, run) for name, run in {**known, **filters}.items()}
        self.filters = {**counted, **own}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _SOURCE:
            raise jinja2.TemplateSyntaxError(f"a template of {len(source):,} characters", 1)
        tree = super()._parse(source, name, filename)
        _send_through(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator, unless what it makes is too large."""
        meter, values = context.parent[_METER], (left, right)
        if operator == "%" and isinstance(left, str):
            _check_format(meter, left, "%", right)
        elif operator == "**":
            bits = left.bit_length() if isinstance(left, int) else 1
            if isinstance(right, int) and bits * abs(right) > 1000:
                raise SecurityError("it makes a number of hundreds of digits")
        elif operator == "*":
            times = [one for one in values if isinstance(one, int)]
            texts = [meter.read(one) for one in values if isinstance(one, str | list | tuple)]
            if times and texts:
                meter.check(texts[0] * max(times[0], 0))
        return meter.made(super().call_binop(context, operator, left, right))

    def call(self: Any, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call, unless what it makes is too large."""
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `str.format`
        meter, own = context.parent[_METER], getattr(method, "__self__", None)
        _check_call(meter, getattr(method, "__name__", ""), own, args, kwargs)
        return meter.made(super().call(context, obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As Jinja's sandbox; and no method that puts any text in the place of a character."""
        return attr not in ("translate", "format_map") and super().is_safe_attribute(
            obj, attr, value
        )


def rendered(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    """What a template of a `Sandbox` writes, given these values.

    Raises:
      jinja2.TemplateError: it asks for more time or memory than chat templates need, or is at
        fault. Its own code may raise other exceptions on what it was not written for.
    """
    meter = Meter(sum(map(_size, values.values())))
    context = template.new_context({**values, _METER: meter})
    return "".join(template.root_render_func(context))


def _size(value: Any) -> int:
    """The characters and items of a JSON value."""
    if isinstance(value, Mapping):
        return sum(_size(one) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 1


# Filters that the tree of a template is sent through --------------------------------------------


def _send_through(tree: nodes.Template) -> None:
    """Put what counts around loops, operators without a hook, literals and output.

    A filter that takes the context is not evaluated before the template is rendered.
    """
    for node in list(tree.find_all(nodes.Node)):
        for name in node.fields:
            value = getattr(node, name)
            if isinstance(value, list):
                value[:] = [_counting(node, one) for one in value]
            else:
                setattr(node, name, _counting(node, value))
        if isinstance(node, nodes.For):
            node.iter = _filter(node.iter, _LOOP)
        elif isinstance(node, nodes.AssignBlock):
            node.filter = _filter(node.filter, _MADE)
        elif isinstance(node, (nodes.Compare, nodes.Operand)):
            node.expr = _filter(node.expr, _READ)


def _counting(parent: nodes.Node, node: Any) -> Any:
    """A part of the tree, or the filter through which it is sent."""
    if isinstance(node, nodes.Concat):
        node = _filter(nodes.List(node.nodes, lineno=node.lineno), _JOIN)
    elif isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    ):
        return _filter(node, _MADE) if isinstance(parent, nodes.Expr | nodes.Stmt) else node
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        node = _filter(node, _MADE)
    return _filter(node, _WRITTEN) if isinstance(parent, nodes.Output) else node


def _filter(node: Any, name: str) -> nodes.Filter:
    if isinstance(node, nodes.TemplateData):
        node = nodes.Const(node.data, lineno=node.lineno)
    return nodes.Filter(node, name, [], [], None, None, lineno=getattr(node, "lineno", 1))


@jinja2.pass_context
def _loop(context: Context, value: Any) -> Any:
    """What a loop goes through, as many as it may."""
    items = value if isinstance(value, list | tuple) else list(value)
    context.parent[_METER].step(len(items))
    return items


@jinja2.pass_context
def _join(context: Context, operands: list) -> str:
    """`a ~ b`."""
    meter = context.parent[_METER]
    meter.read(operands)
    return meter.made("".join(map(str, operands)))


@jinja2.pass_context
def _made(context: Context, value: Any) -> Any:
    return context.parent[_METER].made(value)


@jinja2.pass_context
def _read(context: Context, value: Any) -> Any:
    """A value that is compared."""
    if isinstance(value, str | list | tuple):
        context.parent[_METER].read(value)
    return value


@jinja2.pass_context
def _written(context: Context, value: Any) -> Any:
    """A value that is written; an object that is none of JSON's has nothing to write."""
    meter = context.parent[_METER]
    if not isinstance(value, str):
        meter.read(value)
    return meter.made(value)


def _counted(name: str, run: Callable) -> Callable:
    """A filter that is counted; it is given the context, whatever it takes itself."""
    kind = getattr(run, "jinja_pass_arg", None)

    @jinja2.pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = context.parent[_METER]
        _check_call(meter, name, value, args, kwargs)
        passed = {
            "context": [context],
            "eval_context": [context.eval_ctx],
            "environment": [context.environment],
        }.get(kind.name if kind else "", [])
        return meter.made(run(*passed, value, *args, **kwargs))

    return counted


def _check_call(
    meter: Meter, name: str, own: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise SecurityError where a filter of `own`, or a method of it, would make too much."""
    given = [*args, *kwargs.values()]
    meter.check_numbers(given)
    meter.step(sum(len(one) for one in given if isinstance(one, range | list | tuple)))
    numbers = [one for one in given if isinstance(one, int)]
    texts = [one for one in given if isinstance(one, str)]
    if name in _SHALLOW and not isinstance(own, str):
        size = meter.work(_ITEM * len(own) if isinstance(own, list | tuple | dict) else _ITEM)
    else:
        size = meter.read(own)
    if name == "replace" and isinstance(own, str) and len(texts) > 1:
        meter.check(size + own.count(texts[0]) * len(texts[1]))
    elif name == "join":
        items, between = (own, texts[:1]) if not isinstance(own, str) else (args[:1], [own])
        count = meter.read(items) if isinstance(items, list | tuple) else 1
        meter.check(count * (1 + sum(map(len, between))))
    elif name == "format" and isinstance(own, str):
        _check_format(meter, own, "%", given)
        _check_format(meter, own, "{", given)
    elif name in ("expandtabs", "indent", "tojson", "wordwrap"):
        widths = [*map(abs, numbers), *map(len, texts)] if name != "wordwrap" else map(len, texts)
        meter.check(size * max([1, *widths]))


def _check_format(meter: Meter, text: str, mark: str, values: Any) -> None:
    """Raise SecurityError for a format that writes values at a width, or a number of times."""
    parts = text.split(mark)[1:]
    if any(_WIDE.search(re.split(r"[a-zA-Z}]", part, maxsplit=1)[0]) for part in parts):
        raise SecurityError("it writes at a width that no text has")
    meter.check((1 + len(parts)) * meter.read(values))
