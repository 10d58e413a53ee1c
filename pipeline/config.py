"""YAML plus `section.key=value` overrides become one frozen, checked `Settings` tree.

Every mistake is reported at once, each with its file and line (or the override that made it) and
the nearest valid key.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from pipeline import faults


class UserError(Exception):
    """Something the user can put right; the message says what, where and what to do."""

    exit_code: ClassVar[int] = 1


class ConfigError(UserError):
    """A configuration that cannot be used."""

    exit_code = 2


class MissingInput(UserError):
    """A file, stage output or program that the run needs is not there."""

    exit_code = 3


class BadInput(UserError):
    """An input of another kind, or too damaged to be used; another try would find the same."""

    exit_code = 3


class Settings(BaseModel):
    """One section of the configuration: immutable, strict about names, documented by its fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    operational: ClassVar[frozenset[str]] = frozenset()
    """Fields that change how the work is done but never its result; kept out of fingerprints."""

    def identity(self) -> dict[str, Any]:
        """What of this section decides a result: JSON values, without the operational fields."""
        values: dict[str, Any] = self.model_dump(mode="json", exclude=set(self.operational))
        for name in type(self).model_fields:
            if name in values and isinstance(child := getattr(self, name), Settings):
                values[name] = child.identity()
        return values

    def notes(self) -> dict[str, str]:
        """Remarks on the values of fields, for `explain`: where one comes from if not the file."""
        return {}


def fault(message: str, *keys: str) -> PydanticCustomError:
    """What a validator of a whole section raises about its `keys`, dotted names within it.

    It is reported where the first of them was set that the file or an override sets.
    """
    return PydanticCustomError("section", "{message}", {"message": message, "keys": keys})


S = TypeVar("S", bound=Settings)
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def load(
    schema: type[S], path: Path, overrides: Sequence[str] = (), unset: list[str] | None = None
) -> S:
    """Read `path`, apply `overrides` in order and check the whole against `schema`.

    Raises `ConfigError` listing every fault as `file:line: key: reason`. With a list for `unset`,
    environment variables that are not set are no faults: they stay as they are written, and the
    list gets what would have been said of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(path.name, _yaml_names(path.parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: cannot be read ({error.strerror}){hint}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except ValueError as error:  # what looks like a date is made one
        raise ConfigError(f"{path}: there is a date in it that is none: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: expected `section:` headings, found {type(values).__name__}")
    origin = {key: f"{path}:{line}" for key, line in _lines(root, str(path))}
    for override in overrides:
        key = _apply(override, values)
        # What the file wrote below is replaced along with it.
        origin = {k: v for k, v in origin.items() if not k.startswith(f"{key}.")}
        origin[key] = override
    missing: list[str] = []
    values = _expand(values, "", origin, str(path), missing if unset is None else unset)
    if missing:
        raise ConfigError("\n".join(missing))
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = faults.explained(error, schema, origin, str(path))
        raise ConfigError("\n".join(lines)) from None


def dump(settings: Settings) -> str:
    """The whole tree as YAML, every default written out."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def explain(settings: Settings, indent: int = 0) -> Iterator[str]:
    """The whole tree as YAML lines, each preceded by its field's documentation."""
    pad = "  " * indent
    notes = settings.notes()
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        for line in [*(field.description or "").splitlines(), *notes.get(name, "").splitlines()]:
            yield f"{pad}# {line}".rstrip()
        if isinstance(value, Settings):
            yield f"{pad}{name}:"
            yield from explain(value, indent + 1)
        else:
            plain = settings.model_dump(mode="json", include={name})[name]
            text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6)
            yield f"{pad}{name}: {text.removesuffix('...' + chr(10)).rstrip()}"


def _yaml_names(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []


def _apply(override: str, values: dict[str, Any]) -> str:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: an override has the form section.key=value")
    *parents, leaf = key.split(".")
    section = values
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"{override}: {parent!r} is a value, not a section")
    try:
        section[leaf] = yaml.safe_load(text)
        # What is an error in the file is one here.
        list(_lines(yaml.compose(text, Loader=yaml.SafeLoader), override, f"{key}."))
    except yaml.YAMLError:
        raise ConfigError(f"{override}: the value is not valid YAML") from None
    except ValueError as error:  # what looks like a date is made one
        raise ConfigError(f"{override}: {error}") from None
    return key


def _lines(
    node: yaml.Node | None, file: str, prefix: str = "", above: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[str, int]]:
    """Dotted key and line of everything in the document; a key written twice is an error, and so
    is a value that holds itself by an alias."""
    if node in above:
        line = above[-1].start_mark.line + 1
        raise ConfigError(f"{file}:{line}: {prefix.rstrip('.')}: an alias of what it is in")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                first = seen[key.value]
                raise ConfigError(
                    f"{file}:{line}: {prefix}{key.value}: already set in line {first}"
                )
            seen[key.value] = line
            yield prefix + key.value, line
            yield from _lines(value, file, f"{prefix}{key.value}.", (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            yield f"{prefix}{position}", value.start_mark.line + 1
            yield from _lines(value, file, f"{prefix}{position}.", (*above, node))


def _expand(value: Any, key: str, origin: dict[str, str], file: str, unset: list[str]) -> Any:
    """Put environment variables written `${NAME}` in place; an unset one stays, and is told."""
    if isinstance(value, dict):
        return {
            k: _expand(v, f"{key}.{k}".strip("."), origin, file, unset) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_expand(v, f"{key}.{i}", origin, file, unset) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            where = origin.get(key, file)
            unset.append(f"{where}: {key}: the environment variable {name} is not set;"
                          f" export {name}=...")  # fmt: skip
        return os.environ.get(name, match[0])

    return _VARIABLE.sub(replace, value)
