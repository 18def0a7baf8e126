"""Space files: the trace of a model and the axes of a space as JSON, so that loading needs no run.

A file holds ``format``, the version of this layout, ``digest``, a hash that detects damage, and
``content``: the space's name, the model's inputs, and one or two *states*. A state is a trace with
its axes; the first is unconstrained, and the second, if any, has pinned or tied axes. The model
itself is not in the file, and nothing in the file is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from widthsearch.errors import SpaceError, writing
from widthsearch.tracing.inputs import inputs_from_json, inputs_to_json
from widthsearch.tracing.trace import Trace
from widthsearch.utils.files import write_atomically
from widthsearch.widths import Axis

FORMAT = 1
_AXES = TypeAdapter(tuple[Axis, ...])
_TRACE, _ROWS = TypeAdapter(Trace), ("axes", "pinned")


@dataclass(frozen=True)
class SpaceState:
    """A trace and the axes of the space that is made of it.

    Attributes:
        trace: The trace.
        axes: One axis per axis of the trace.
        stepped: The names of axes whose steps were given by a user.

    Example:
        >>> from torch import nn
        >>> from widthsearch.tracing.tracer import trace
        >>> traced = trace(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)), (5,))
        >>> state = SpaceState(traced, (Axis("0", 8, 1, 16, 1),), stepped=frozenset({"0"}))
        >>> len(state.trace.axes) == len(state.axes)
        True
    """

    trace: Trace
    axes: tuple[Axis, ...]
    stepped: frozenset[str]

    def check(self, model: nn.Module, path: str) -> None:
        """Check that it is of a model.

        Raises:
            SpaceError: A tensor has another shape in the model.
            ValueError: The axes are not those of the trace.
        """
        if difference := self.trace.difference(model):
            raise SpaceError(f"{path!r} is a space of another model: {difference}")
        if [axis.base for axis in self.axes] != self.trace.base:
            raise ValueError("its axes are not those of its trace")


def write_space(path: Path, name: str, inputs: Any, states: Sequence[SpaceState]) -> None:
    """Write a space file; an existing file is replaced in one step.

    Raises:
        StudyError: The file cannot be written.
    """
    content = {
        "name": name,
        "inputs": inputs_to_json(inputs),
        "states": [
            {
                "trace": state.trace.to_json(),
                "axes": [asdict(axis) for axis in state.axes],
                "stepped": sorted(state.stepped),
            }
            for state in states
        ],
    }
    text = json.dumps({"format": FORMAT, "digest": _digest(content), "content": content})
    with writing(path.parent):
        write_atomically(path, lambda file: file.write(text.encode()))


def read_space(path: Path) -> tuple[str, Any, list[SpaceState]]:
    """The space's name, the model's inputs and the states in a file of :func:`write_space`.

    Raises:
        SpaceError: The file cannot be read, is damaged, or has another format.
    """
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpaceError(f"the space file {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        file = None
    version = file.get("format") if isinstance(file, Mapping) else None
    if version is not None and version != FORMAT:
        raise SpaceError(
            f"a space file must have format {FORMAT}, but {str(path)!r} has {version!r}: save the "
            "space again with this version of widthsearch"
        )
    with intact(path):
        content = file["content"]
        if _digest(content) != file["digest"]:
            raise ValueError("its content does not have its digest")
        states = [
            SpaceState(
                Trace.from_json(state["trace"]),
                _AXES.validate_python(state["axes"]),
                frozenset(state["stepped"]),
            )
            for state in content["states"]
        ]
        for state in states:
            rows = {key: [vars(row) for row in getattr(state.trace, key)] for key in _ROWS}
            _TRACE.validate_python({**vars(state.trace), **rows})
        return str(content["name"]), inputs_from_json(content["inputs"]), states


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """A context in which whatever fails is due to a damaged space file.

    Raises:
        SpaceError: Something has failed.
    """
    try:
        yield
    except SpaceError:
        raise
    except Exception as error:
        raise SpaceError(
            f"a space file must be unchanged since SearchSpace.save, but {str(path)!r} is damaged: "
            "save the space again"
        ) from error


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
