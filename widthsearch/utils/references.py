"""References to functions by name, such as ``module:function``, with one-line errors."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from widthsearch.errors import SpaceError, located


def reference_of(function: str | Callable[..., Any]) -> str:
    """The reference of a function, or the reference that is given."""
    if isinstance(function, str):
        return function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def load_function(
    reference: str | Callable[..., Any], error: type[Exception] = SpaceError
) -> Callable[..., Any]:
    """Import the function of ``package.module:function`` or ``path/to/file.py:function``.

    Args:
        reference: The reference; a function is returned as it is.
        error: The type of the error that is raised, with one line on the fault and the way out.

    Example:
        >>> load_function("math:sqrt")(9.0)
        3.0
        >>> load_function("math:squrt")
        Traceback (most recent call last):
        widthsearch.errors.SpaceError: 'math:squrt': math has no function 'squrt'; did you mean \
'sqrt'?
    """
    if not isinstance(reference, str):
        return reference
    where, _, name = reference.rpartition(":")
    parent = [str(Path(where).resolve().parent)] if where.endswith(".py") else []
    for folder in (str(Path.cwd()), *parent):  # an installed command has neither on its path
        if folder not in sys.path:
            sys.path.append(folder)
    if not where or not name:
        raise error(
            f"{reference!r} must be `package.module:function` or `path/to/file.py:function`"
        )
    if parent and not Path(where).is_file():
        raise error(f"{reference!r}: there is no file {where!r} (looked in {Path.cwd()})")
    try:
        module = _file_module(Path(where)) if parent else importlib.import_module(where)
    except (Exception, SystemExit) as cause:
        raise error(f"{reference!r} cannot be imported: {located(cause)}") from cause
    function = getattr(module, name, None)
    if not callable(function):
        public = [n for n, f in vars(module).items() if callable(f) and not n.startswith("_")]
        close = difflib.get_close_matches(name, public, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise error(f"{reference!r}: {where} has no function {name!r}{hint}")
    return function  # type: ignore[no-any-return]


def check_takes(
    key: str, name: str, function: Any, arguments: Sequence[str], error: type[Exception]
) -> None:
    """Check that a function takes so many positional arguments.

    Args:
        key: The function's key in the configuration, for the message.
        name: Its reference, for the message.
        function: The function; one without a signature, such as some of C, is not checked.
        arguments: The names of the arguments.
        error: The type of the error that is raised where it takes others.

    Example:
        >>> check_takes("loss", "mine", lambda network: 0.0, ("network", "batch"), SpaceError)
        Traceback (most recent call last):
        widthsearch.errors.SpaceError: loss must be a function of (network, batch), but 'mine' is \
not: too many positional arguments
    """
    rule = f"{key} must be a function of ({', '.join(arguments)}), but {name!r} is not"
    if not callable(function):
        raise error(f"{rule}: it is {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as cause:
        raise error(f"{rule}: {cause}") from None


def file_digest(function: Callable[..., Any]) -> str | None:
    """A digest of the file that a function is in; None where it is in none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
        return None if file is None else _digest(Path(file))
    except (OSError, TypeError):
        return None


def _digest(path: Path) -> str:
    return hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:12]


_imported: dict[str, str] = {}
"""The digests of the files that were imported here under names of their own, by these names."""


def _file_module(path: Path) -> ModuleType:
    """The module of a file; a file with the same content is imported once.

    It has the name by which ``import`` finds this file, so that its classes are those of the user's
    own imports and can be pickled. Where that name finds another file, or an older content of this
    one, the module gets a name with a digest.
    """
    digest, plain = _digest(path), _importable(path)
    loaded = None if plain is None else sys.modules.get(plain)
    if plain is not None and loaded is not None and _imported.get(plain, digest) == digest:
        return loaded
    if plain is not None and loaded is None:
        _imported[plain] = digest
        return importlib.import_module(plain)
    name = f"_widthsearch_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _importable(path: Path) -> str | None:
    """The name by which ``import`` finds a file: with its packages; None where it finds another."""
    path = path.resolve()
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        parts, folder = [folder.name, *parts], folder.parent
    name = ".".join(parts)
    importlib.invalidate_caches()  # the file may be new
    try:
        loaded = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    except Exception:  # noqa: BLE001  to find a name, its package is imported
        return None
    origin = None if spec is None else spec.origin
    return name if origin is not None and Path(origin).resolve() == path else None
