"""Context managers that say so where they are used without their ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

from widthsearch.errors import StudyError

P = ParamSpec("P")
T = TypeVar("T")


class Block(Generic[T]):
    """A context manager; whatever else is asked of it is an error that shows its ``with`` block.

    Args:
        entered: The context manager.
        call: The name of the function that returned it, for the message.

    Example:
        >>> @block
        ... def search():
        ...     yield "a search"
        >>> with search() as entered:
        ...     entered
        'a search'
        >>> search().ask()
        Traceback (most recent call last):
        widthsearch.errors.StudyError: `search` must be entered, `with ….search() as search:`, but \
was asked for 'ask' outside of a `with` block
    """

    def __init__(self, entered: AbstractContextManager[T], call: str) -> None:
        self._entered, self._call = entered, call

    def __enter__(self) -> T:
        return self._entered.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._entered.__exit__(kind, error, trace)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a protocol that asks whether it is there
            raise AttributeError(name)
        raise StudyError(
            f"`{self._call}` must be entered, `with ….{self._call}() as {self._call}:`, but was "
            f"asked for {name!r} outside of a `with` block"
        )


def block(function: Callable[P, Iterator[T]]) -> Callable[P, Block[T]]:
    """As :func:`contextlib.contextmanager`; what it returns explains itself, see :class:`Block`."""
    made = contextmanager(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return Block(made(*args, **kwargs), function.__name__)

    return call
