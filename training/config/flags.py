"""Command-line flags made from the config dataclasses: `--learning-rate` sets `learning_rate`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
from typing import Any, Literal, get_args, get_origin, get_type_hints


def field_docs(config: type) -> dict[str, str]:
    """Field name -> the docstring below it in the class's source, or in that of a class it extends."""
    docs = {}
    for base in reversed([kind for kind in config.__mro__ if dataclasses.is_dataclass(kind)]):
        docs |= _own_docs(base)
    return docs


def _own_docs(config: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body
    docs = {}
    for field, text in zip(body, body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and is_text:
            docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def add_flags(parser: argparse.ArgumentParser, config: type, prefix: str = "", skip: tuple[str, ...] = ()) -> None:
    """One flag per field; nested dataclasses are left to calls of their own."""
    hints, docs = get_type_hints(config), field_docs(config)
    group = parser.add_argument_group(config.__name__)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) or field.name in skip:
            continue
        required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"help": docs.get(field.name, "").replace("%", "%%"), "dest": prefix + field.name}
        if not required:
            options |= {"default": field.default}
            options["help"] += f" (default: {field.default!r})".replace("%", "%%")
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            options |= {"nargs": "*", "type": get_args(kind)[0]}
        else:
            options["type"] = get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
        group.add_argument("--" + (prefix + field.name).replace("_", "-"), required=required, **options)


def read_flags(arguments: argparse.Namespace, config: type, prefix: str = "", **more: Any) -> Any:
    """The config that the parsed flags describe; `more` gives fields that are no flags."""
    values = dict(more)
    for field in dataclasses.fields(config):
        if field.name not in values and hasattr(arguments, prefix + field.name):
            value = getattr(arguments, prefix + field.name)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return config(**values)
