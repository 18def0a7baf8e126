"""Checkpoint files, protected against damage, mix-ups and code execution.

The first line is JSON with the identity of the training and the SHA-256 of the rest. The rest is
torch's format, loaded with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from widthsearch.errors import CheckpointError, first_line
from widthsearch.utils.files import write_atomically


def write_checkpoint(path: Path, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Replace a checkpoint atomically.

    Args:
        path: The file; its folder is created.
        run: The identity of the training, as JSON values; :func:`read_checkpoint` requires the
            same.
        state: Tensors and plain values.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.ckpt")
        >>> write_checkpoint(path, {"seed": 0}, {"x": torch.ones(2)})
        >>> read_checkpoint(path, {"seed": 0}, torch.device("cpu"))
        {'x': tensor([1., 1.])}
        >>> read_checkpoint(path, {"seed": 1}, torch.device("cpu"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        widthsearch.errors.CheckpointError: ... run.seed=0 where this one has 1; ...
    """
    content = io.BytesIO()
    torch.save(dict(state), content)
    payload = content.getbuffer()
    header = {"format": 1, "run": dict(run), "sha256": hashlib.sha256(payload).hexdigest()}

    def write(file: BinaryIO) -> None:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(payload)

    write_atomically(path, write)


def read_checkpoint(path: Path, run: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Read a checkpoint's state, with its tensors on a device.

    Raises:
        CheckpointError: The file is missing, damaged or of another training.
    """
    try:
        first, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(
            f"a checkpoint must be readable, but {path} is not ({error.strerror}); restart the run"
        ) from error
    try:
        header = json.loads(first)
        stored, whole = header["run"], header["sha256"] == hashlib.sha256(payload).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"a checkpoint must be as it was written, but {path} is damaged; restart the run"
        )
    here = json.loads(json.dumps(run))
    if stored != here:
        raise CheckpointError(
            f"a checkpoint must be of the same run, but {path} has {_difference(stored, here)}; "
            "restart the run, or use another folder for each run's checkpoints"
        )
    try:
        state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
        return dict(state)
    except Exception as error:  # torch raises any type
        raise CheckpointError(
            f"a checkpoint must hold tensors and plain values alone, but {path} does not "
            f"({first_line(error)}); restart the run"
        ) from error


def _difference(there: Any, here: Any, place: str = "run") -> str:
    """The first difference of two JSON trees."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{place}.{key}")
    return f"{place}={there!r} where this one has {here!r}"
