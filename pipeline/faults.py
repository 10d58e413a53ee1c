"""What is wrong with a configuration: which key, where it was set, and which one was meant."""

from __future__ import annotations

import difflib
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_FEW_KEYS = 12
"""As many are named in a line."""


def explained(
    error: ValidationError, schema: type[BaseModel], origin: dict[str, str], file: str
) -> list[str]:
    """A line for every key that is wrong; of a field's alternatives, what each would have asked."""
    found: dict[str, list[str]] = {}
    for details in error.errors():
        key, message = _explain(details, schema, origin)
        found.setdefault(key, []).append(message)
    lines = []
    for key, messages in found.items():
        if key and any(other.startswith(f"{key}.") for other in found):
            continue  # an alternative that was not meant
        where = origin.get(_written(key, origin), file)
        rest = [message.removeprefix("Input should be ") for message in messages[1:]]
        lines.append(": ".join(filter(None, (where, key, ", or ".join([messages[0], *rest])))))
    return lines


def _explain(
    error: ErrorDetails, schema: type[BaseModel], origin: dict[str, str]
) -> tuple[str, str]:
    """The key that is wrong, and why."""
    path = _path(error["loc"], schema)
    key = ".".join(path)
    message = error["msg"]
    if error["type"] == "extra_forbidden":
        message = f"no such key; {_hint(path, schema)}"
    elif error["type"] == "model_type" and (section := _at(path, schema)):
        message = f"a section, not a value; its keys are {', '.join(sorted(section.model_fields))}"
    elif error["type"] in {"tuple_type", "list_type"}:
        message = f"Input should be a list, as [{error['input']}]"
    elif named := error.get("ctx", {}).get("keys"):
        keys = [f"{key}.{name}".strip(".") for name in named]
        key = next((key for key in keys if key in origin), keys[0])
    return key, message.removeprefix("Value error, ")


def _path(location: Sequence[int | str], schema: type[BaseModel]) -> list[str]:
    """Where a fault is, without the names that pydantic gives the alternatives of a field."""
    path: list[str] = []
    section: Any = schema
    parts = iter(map(str, location))
    for part in parts:
        path.append(part)
        field = section.model_fields.get(part) if section else None
        if field and typing.get_origin(field.annotation) in {typing.Union, types.UnionType}:
            kinds = [kind for kind in typing.get_args(field.annotation) if kind is not type(None)]
            if len(kinds) > 1:
                next(parts, None)
        section = _section(section, part)
    return path


def _at(path: Sequence[str], schema: type[BaseModel]) -> type[BaseModel] | None:
    """The section at a path, if it is one."""
    section: Any = schema
    for part in path:
        section = _section(section, part)
    return section if isinstance(section, type) else None


def _written(key: str, origin: dict[str, str]) -> str:
    """The key that was written where `key` is wrong: itself, the last below it, or one above."""
    below = [other for other in origin if other.startswith(f"{key}.")]
    if key and key not in origin and below:  # an override makes the sections above it
        return below[-1]
    while key and key not in origin:
        key = key.rpartition(".")[0]
    return key


def _hint(path: Sequence[str], schema: type[BaseModel]) -> str:
    """Which key was meant by one that does not exist; all that there are if none is near."""
    section: Any = schema
    for part in path[:-1]:
        section = _section(section, part)
    if section is None:
        return "there are no keys here"
    if near := _nearest(path[-1], section, schema):
        return f"did you mean {' or '.join(map(repr, near))}?"
    names = sorted(section.model_fields)
    if len(names) <= _FEW_KEYS:
        return f"the keys here are {', '.join(names)}"
    listed = textwrap.fill(", ".join(names), 96, initial_indent="  ", subsequent_indent="  ")
    return f"`make config` explains the keys here:\n{listed}"


def _nearest(wrong: str, section: type[BaseModel], schema: type[BaseModel]) -> list[str]:
    """The name in `section` that is most like `wrong`, or dotted ones elsewhere that are more."""
    here = {
        name: max(_likeness(wrong, name, 0.6), _begins(wrong, name), _says(wrong, field))
        for name, field in section.model_fields.items()
    }
    there = {name: _likeness(wrong, name.rpartition(".")[2], 0.75) for name in _dotted(schema)}
    best = max([*here.values(), *there.values()])
    if best in here.values():
        return [name for name in here if here[name] == best][:1] if best else []
    return [name for name in there if there[name] == best]


def _likeness(one: str, other: str, at_least: float) -> float:
    """Up to 1; 0 if it is less than that, or if one may just be found among the other's letters."""
    if 2 * min(len(one), len(other)) <= max(len(one), len(other)):
        return 0.0
    ratio = difflib.SequenceMatcher(None, one, other).ratio()
    return ratio if ratio >= at_least else 0.0


def _begins(wrong: str, name: str) -> float:
    """For `batch_size` and `batch`, `warmup` and `warmup_steps`."""
    return 0.95 * (wrong.startswith(f"{name}_") or name.startswith(f"{wrong}_"))


def _says(wrong: str, field: FieldInfo) -> float:
    """For `learning_rate` and `lr`, whose explanation begins so."""
    words = re.findall(r"\w+", (field.description or "").lower())[:3]
    beginnings = ("_".join(words[:count]) for count in range(1, len(words) + 1))
    return max((_likeness(wrong, beginning, 0.8) for beginning in beginnings), default=0.0)


def _dotted(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All keys, but for those of sections that have names of the user's choice."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        section = _section(schema, name)
        if section is not None and typing.get_origin(field.annotation) is not dict:
            yield from _dotted(section, f"{prefix}{name}.")


def _section(schema: Any, name: str) -> type[BaseModel] | None:
    """The class behind a field, also when it is optional or a mapping's value."""
    if schema is None:
        return None
    if name not in schema.model_fields:  # a key of the mapping whose values are this class
        found: type[BaseModel] = schema
        return found
    pending = [schema.model_fields[name].annotation]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and not isinstance(kind, types.GenericAlias):
            if issubclass(kind, BaseModel):
                return kind
        else:
            pending.extend(typing.get_args(kind))
    return None
