"""Scores of the user's choice: plain functions, named in the settings as `package.module:function`.

A function takes a list of pictures, uint8 [height, width, 3] in RGB, and a list of their captions,
and returns a float32 array with a value for each. It is imported from the working directory or from
an installed package. Its module's source is part of what a result is known by, so that a changed
function is asked again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config import ConfigError

Picture = npt.NDArray[np.uint8]
Score = Callable[[Sequence[Picture], Sequence[str]], npt.NDArray[np.float32]]


def column(name: str) -> str:
    """The column of `looked-*.parquet` that holds a score."""
    return f"score_{name}"


def identity(name: str, function: str) -> str:
    """SHA-256 of the source of the function's module, which is not run.

    Raises `ConfigError` if there is no such module, or no such name in it.
    """
    module, colon, attribute = function.partition(":")
    key = f"screen.scores.{name}.function: {function!r}"
    if not (module and colon and attribute):
        raise ConfigError(f"{key} is not of the form package.module:function")
    try:
        found = importlib.util.find_spec(module)
    except ImportError as error:
        raise ConfigError(f"{key}: {error}; install it, or {_HINT}") from None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        raise ConfigError(f"{key}: there is no module {module!r}; install it, or {_HINT}")
    source = Path(found.origin).read_bytes()
    if attribute not in (names := _names(ast.parse(source).body)):
        listed = ", ".join(sorted(names)) or "no names"
        raise ConfigError(f"{key}: {found.origin} has {listed}, but not {attribute!r}")
    return hashlib.sha256(source).hexdigest()


_HINT = "run from the folder that holds it"


def _names(body: Sequence[ast.stmt]) -> set[str]:
    """What a module defines, assigns or imports at its top level, under conditions too."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.If):
            names |= _names(node.body) | _names(node.orelse)
        elif isinstance(node, ast.Try):
            names |= _names(node.body) | _names(node.orelse) | _names(node.finalbody)
            for handler in node.handlers:
                names |= _names(handler.body)
    return names


def load(functions: Mapping[str, Sequence[str]]) -> dict[str, Score]:
    """The functions by the name of their column; `functions`: name -> (function, its identity).

    Raises `ConfigError` if the source is not what the task was planned with.
    """
    loaded: dict[str, Score] = {}
    for name, (function, planned) in functions.items():
        if identity(name, function) != planned:
            raise ConfigError(f"screen.scores.{name}: {function} has changed; start the build anew")
        module, _, attribute = function.partition(":")
        loaded[column(name)] = getattr(importlib.import_module(module), attribute)
    return loaded


def score(
    functions: Mapping[str, Score], pictures: Sequence[Picture], texts: Sequence[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """What each function says of some pictures, which none may change. Raises `ConfigError` naming
    the score if it is not a value each."""
    found = {}
    for name, function in functions.items():
        values = np.asarray(function(pictures, texts))
        if values.shape != (len(pictures),) or values.dtype.kind not in "fiub":
            raise ConfigError(
                f"screen.scores.{name.removeprefix(column(''))}: its function returned "
                f"{values.dtype} {list(values.shape)} for {len(pictures)} pictures; "
                "a number for each is wanted"
            )
        found[name] = values.astype(np.float32)
    return found
