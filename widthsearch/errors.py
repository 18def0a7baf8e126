"""The errors that a user can resolve.

::

    WidthsearchError          shown by the command line as one line, exit code 2
    ├── WidthsError           a width outside its axis or off the grid, an axis that does not exist
    ├── TraceError            a model that cannot be traced: names the module and the operation
    ├── SpaceError            a space that cannot be loaded, made or constrained
    ├── DataError             a data folder or a dataset that cannot be used
    │   └── ImageError        an image in a file that cannot be used
    ├── DeviceError           a device that does not exist here
    ├── StudyError            a study's configuration, or a study that differs from the stored one
    ├── StorageError          a storage that cannot be opened
    └── CheckpointError       a checkpoint that is corrupt or belongs to another run

Every message has the rule, the culprit's name, its value, and the way out, in one line. Broken
invariants of widthsearch itself are ``AssertionError``: bugs to report, not input to correct.
"""

from __future__ import annotations

import difflib
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 2000
"""The characters of the longest message."""


class WidthsearchError(Exception):
    """The base of all errors that a user can resolve.

    Example:
        >>> print(WidthsearchError("no axis 'a\\nb'"))  # one line, whatever a name holds
        no axis 'a\\nb'
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(message: str) -> str:
    """A message in one line of printable characters, shortened in its middle if it is very long."""
    if len(message) > LONGEST:
        message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


class WidthsError(WidthsearchError, ValueError):
    """A width vector that does not fit its space."""


class TraceError(WidthsearchError):
    """A model that cannot be traced."""


class SpaceError(WidthsearchError):
    """A space that cannot be loaded, made or constrained."""


class DataError(WidthsearchError):
    """Data that cannot be used."""


class ImageError(DataError):
    """An image in a file that cannot be used: no fault of the network that was to learn from it."""


class DeviceError(WidthsearchError):
    """A device that does not exist here."""


class StudyError(WidthsearchError):
    """A study that is configured wrongly, or differs from the stored study of its name."""


class StorageError(WidthsearchError):
    """A storage that cannot be used, or a folder that cannot be written."""


class CheckpointError(WidthsearchError):
    """A checkpoint that is corrupt or belongs to another run."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A context for writing files to ``folder``: errors of the system become one line.

    Raises:
        StorageError: A file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the folder {str(folder)!r} must be writable, but {error.filename or 'a file'} is "
            f"not: {error.strerror}; name another folder, or make this one writable"
        ) from error


_UNPICKLER = re.compile(r"WeightsUnpickler error: (?:Unsupported global: GLOBAL ([\w.]+))?")
"""Where torch's refusal to unpickle, of twenty lines, names the object that is no tensor."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none.

    A line that ends with a colon has the next one with it, as where tensors do not fit a network.
    Of torch's refusal to unpickle it is what the file holds, and not the advice to trust it.

    Example:
        >>> first_line(RuntimeError("Error(s) in loading:\\n\\tMissing key(s): 'a'.\\n\\tMore."))
        "Error(s) in loading: Missing key(s): 'a'."
        >>> first_line(ValueError("Weights only load failed … WeightsUnpickler error: Unsupported "
        ...     "global: GLOBAL numpy._core.multiarray.scalar was not an allowed global"))
        'it holds numpy._core.multiarray.scalar'
    """
    message = str(error)
    if (refused := _UNPICKLER.search(message)) is not None:
        return f"it holds {refused[1]}" if refused[1] else "it is no file of torch.save"
    first, *others = message.strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def located(error: BaseException) -> str:
    """:func:`one_line`, with the file and line of the user's code where there is some.

    That is the innermost frame outside of this package, of Python's library and of installed
    packages.

    Example:
        >>> import widthsearch
        >>> try:
        ...     widthsearch.no_such_name
        ... except AttributeError as error:
        ...     located(error)
        "AttributeError: module 'widthsearch' has no attribute 'no_such_name'"
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename)]
    if not own or isinstance(error, SyntaxError):  # which says its place itself
        return one_line(error)
    path = Path(own[-1].filename)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{one_line(error)} ({path}:{own[-1].lineno})"


def _is_users(file: str) -> bool:
    """Whether a file is code of the user: none of a package that is installed, nor of this one."""
    library = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    installed = [Path(__file__).parent, *map(Path, filter(None, library))]
    path = Path(file)
    return (
        not file.startswith("<")
        and not {"site-packages", "dist-packages"} & set(path.parts)
        and not any(path.is_relative_to(folder) for folder in installed)
    )


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The way out after an unknown name: the closest known name, or another text if none is."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else otherwise
