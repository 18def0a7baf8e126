"""Checkpoint files that are whole, of the right run, and hold no code.

The first line is JSON: whose checkpoint it is, and the SHA-256 of the rest. The rest is torch's
format and is loaded with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from widthsearch.errors import CheckpointError
from widthsearch.utils.files import write_atomically


def write_checkpoint(path: Path, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the last one stays until the new one is whole, on disk.

    Args:
        path: The file; its folder is made.
        run: What the run is, as JSON values; whoever reads must name the same.
        state: Tensors and plain values.
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
    """The state in a file, its tensors on the device.

    Raises:
        CheckpointError: It is not there, is damaged, or is of another run.
    """
    try:
        first, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(
            f"a checkpoint must be readable, but {path} is not ({error.strerror}); start the run "
            "anew"
        ) from error
    try:
        header = json.loads(first)
        whose, whole = header["run"], header["sha256"] == hashlib.sha256(payload).hexdigest()
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"a checkpoint must be as it was written, but {path} is damaged; start the run anew"
        )
    here = json.loads(json.dumps(run))
    if whose != here:
        raise CheckpointError(
            f"a checkpoint must be of the same run, but {path} has {_difference(whose, here)}; "
            "start the run anew, or keep each run's checkpoints in a folder of its own"
        )
    state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    assert isinstance(state, dict)
    return state


def _difference(there: Any, here: Any, place: str = "run") -> str:
    """The first value that two JSON trees differ in."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{place}.{key}")
    return f"{place}={there!r} where this one has {here!r}"
