"""Atomic writes, and the package's cache folder."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

VARIABLE = "WIDTHSEARCH_CACHE"
"""The environment variable that names the cache folder; an empty value turns the cache off."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a file atomically: a reader sees the old content or the new, never a part of it.

    The temporary name is random, because processes on several hosts may write to a shared folder.

    Args:
        path: The file; its folder is created.
        write: Writes the content to an open file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "new", "a.txt")
        >>> write_atomically(path, lambda file: file.write(b"whole"))
        >>> path.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def cache_folder(kind: str) -> Path | None:
    """The folder for cached files of one kind, e.g. ``latency``; None if the cache is off.

    It is in ``$WIDTHSEARCH_CACHE``, else in ``$XDG_CACHE_HOME/widthsearch``, else in
    ``~/.cache/widthsearch``.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given, kind) if given else None
    caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(caches, "widthsearch", kind)
