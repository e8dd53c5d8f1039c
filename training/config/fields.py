"""A config's field is the one source of a setting: checks, command line and nodes are derived from it.

`setting` adds a range, the step of an input and whether it is advanced to a dataclass field; the docstring below the
field in the class's source is its documentation.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class ConfigField:
    """A field of a config, with all that is derived from it.

    Attributes:
        name: the field's name.
        type: int, float, bool, str or Path; of a tuple's items; a dataclass where configs are nested.
        default: `dataclasses.MISSING` for a required field.
        documentation: the docstring below the field, in one line.
        choices: the values of a field typed `Literal[...]`.
        repeated: whether the field is a tuple.
        low, high: the range, both ends included; None where there is no end.
        step: what an input's arrows add; None leaves it to the input.
        snap: whether an input rounds to multiples of `step`.
        advanced: whether a node hides the input until advanced inputs are asked for.
    """

    name: str
    type: type
    default: Any
    documentation: str = ""
    choices: tuple = ()
    repeated: bool = False
    low: float | None = None
    high: float | None = None
    step: float | None = None
    snap: bool = False
    advanced: bool = False

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def is_config(self) -> bool:
        """Whether the field is a config of its own."""
        return dataclasses.is_dataclass(self.type)

    @property
    def range(self) -> str:
        """The range in words, such as "1 to 1000"; empty without one."""
        if self.low is None:
            return ""
        return f"at least {self.low}" if self.high is None else f"{self.low} to {self.high}"

    def allows(self, value: Any) -> bool:
        """Whether a value, or each of a repeated field, is finite and lies in the range; None does."""
        if isinstance(value, tuple):
            return all(map(self.allows, value))
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if value is None or self.low is None:
            return True
        return self.low <= value and (self.high is None or value <= self.high)


def setting(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    snap: bool = False,
    advanced: bool = False,
) -> Any:
    """A dataclass field with a default and, in its metadata, the attributes of `ConfigField` that are given."""
    metadata = {"low": low, "high": high, "step": step, "snap": snap, "advanced": advanced}
    return dataclasses.field(default=default, metadata=metadata)


def rate_setting(default: float, **more: Any) -> Any:
    """A learning rate."""
    return setting(default, low=0, high=10, step=1e-7, **more)


def alpha_setting(default: float, **more: Any) -> Any:
    """The scale alpha of low-rank adapters."""
    return setting(default, **{"low": 1e-6, "high": 1e6, "step": 0.5} | more)


def side_setting(default: int) -> Any:
    """Width or height of a picture in pixels; `checks.check_size` asks for multiples of 8."""
    return setting(default, low=8, high=8192, step=8)


@functools.cache
def config_fields(config: type) -> dict[str, ConfigField]:
    """The fields of a config dataclass by name, in order."""
    hints, docs = get_type_hints(config), field_docs(config)
    fields = {}
    for field in dataclasses.fields(config):
        hint = _parse_hint(hints[field.name])
        fields[field.name] = ConfigField(
            name=field.name, default=field.default, documentation=docs.get(field.name, ""), **hint, **field.metadata
        )
    return fields


def _parse_hint(hint: Any) -> dict[str, Any]:
    """The attributes of a `ConfigField` of a type hint; of a union such as `int | None` its first type."""
    if get_origin(hint) is Literal:
        return {"type": str, "choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"type": get_args(hint)[0], "repeated": True}
    return {"type": get_args(hint)[0] if isinstance(hint, types.UnionType) else hint}


def field_docs(config: type) -> dict[str, str]:
    """Field name -> the docstring below it in the class's source, or in that of a class it extends."""
    docs = {}
    for base in reversed([kind for kind in config.__mro__ if dataclasses.is_dataclass(kind)]):
        docs |= _docs_in_source(base)
    return docs


@functools.cache
def _docs_in_source(config: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body
    docs = {}
    for field, text in zip(body, body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and is_text:
            docs[field.target.id] = " ".join(text.value.value.split())
    return docs
