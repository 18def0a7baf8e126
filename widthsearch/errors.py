"""The errors that a user can mend.

::

    WidthsearchError          shown by the command line as one line, exit code 2
    ├── WidthsError           a width outside its axis or off the grid, an axis that does not exist
    ├── TraceError            a model that cannot be traced: names the module and the operation
    ├── SpaceError            a space reference that cannot be imported or gives no space
    ├── DataError             a data folder or a dataset that cannot be used
    ├── DeviceError           a device that is not there
    ├── StudyError            a study's configuration, or a study that does not fit what is stored
    ├── StorageError          a storage that cannot be opened
    └── CheckpointError       a checkpoint that is corrupt or belongs to another run

Every message says the rule, the culprit's name, its value, and what to do. Broken invariants of
widthsearch itself are ``AssertionError``: those are bugs to report, not input to mend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WidthsearchError(Exception):
    """Anything that a user can mend."""


class WidthsError(WidthsearchError, ValueError):
    """A width vector that does not fit its space."""


class TraceError(WidthsearchError):
    """A model that cannot be traced."""


class SpaceError(WidthsearchError):
    """A space that cannot be found or made."""


class DataError(WidthsearchError):
    """Data that cannot be used."""


class DeviceError(WidthsearchError):
    """A device that is not there."""


class StudyError(WidthsearchError):
    """A study that is configured wrongly, or does not fit what is stored under its name."""


class StorageError(WidthsearchError):
    """A storage that cannot be opened."""


class CheckpointError(WidthsearchError):
    """A checkpoint that is corrupt or belongs to another run."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While files are written there: what the system refuses is said in one line.

    Raises:
        StudyError: A file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise StudyError(
            f"the folder {str(folder)!r} must be writable, but {error.filename or 'a file'} is "
            f"not: {error.strerror}; name another folder, or go on when that is mended"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
