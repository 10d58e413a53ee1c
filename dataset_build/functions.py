"""Functions of the user's choice, named in the settings as `package.module:function`.

They are imported from the folder that the build is started in, or from an installed package. Their
module's source is part of what a result is known by, so a changed function is asked again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import logging
import symtable
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError

log = logging.getLogger(__name__)


def identity(setting: str, function: str) -> str:
    """SHA-256 of the source of a function's module, which is not run; packages above it are, for
    they say where it is.

    `setting` is the name of the setting that has it. Raises `ConfigError` if there is no such
    module that Python could run, or no such name in it.
    """
    module, colon, attribute = function.partition(":")
    key = f"{setting}: {function!r}"
    if not (module and colon and attribute):
        raise ConfigError(f"{key} is not of the form package.module:function")
    try:
        found = importlib.util.find_spec(module)
    except ImportError as error:
        raise ConfigError(f"{key}: {error}; install it, or {_HINT}") from None
    except Exception as error:  # of a package above it, or of a name that can be none of a module
        raise ConfigError(f"{key}: cannot be found: {type(error).__name__}: {error}") from None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise ConfigError(f"{key}: no module {module!r} in Python is there; install it, or {_HINT}")
    try:
        source = Path(found.origin).read_bytes()
        names = _names(importlib.util.decode_source(source))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{key}: {found.origin} cannot be read as Python: {error}") from None
    if attribute not in names and "*" not in names:
        listed = ", ".join(sorted(names)) or "no names"
        raise ConfigError(f"{key}: {found.origin} has {listed}, but not {attribute!r}")
    return hashlib.sha256(source).hexdigest()


def load(setting: str, function: str, planned: str) -> Callable[..., Any]:
    """The function; raises `ConfigError` if its source is not what the task was planned with, or
    its module cannot be imported."""
    if identity(setting, function) != planned:
        raise ConfigError(f"{setting}: {function} has changed; start the build anew")
    module, _, attribute = function.partition(":")
    with called(setting):
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return loaded


@contextmanager
def called(setting: str) -> Iterator[None]:
    """While a function is called. Raises `ConfigError` naming the setting for whatever it raises,
    and logs where."""
    try:
        yield
    except Exception as error:
        log.exception("%s", setting)
        raise ConfigError(
            f"{setting}: its function failed: {type(error).__name__}: {error}"
        ) from error


_HINT = "run from the folder that holds it"


def _names(source: str) -> set[str]:
    """What a module defines, assigns or imports at its top level, under conditions and in loops
    too; `*` if there is more, which another module decides."""
    table = symtable.symtable(source, "<module>", "exec")
    names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    imports = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return names | {"*" for node in imports if node.names[0].name == "*"}
