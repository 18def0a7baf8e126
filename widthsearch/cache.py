"""Where things are kept on disk, and traces kept there under a hash of all that they depend on.

A trace follows from the model's code and sizes, its input, torch and widthsearch. A model of which
something cannot be told by value (``hashing.py``) is traced every time: an entry may be missed,
never mistaken. Entries are JSON; one that is damaged counts as missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from widthsearch.checkpoints import write_atomically
from widthsearch.hashing import Walk
from widthsearch.inputs import Inputs, as_inputs
from widthsearch.libraries import NoHash, put_into_torch, settings
from widthsearch.modules import tensors_of
from widthsearch.polynomials import Poly
from widthsearch.trace import Pinned, Trace, TracedAxis, has_content, trace

_logger = logging.getLogger(__name__)

VARIABLE = "WIDTHSEARCH_CACHE"
"""The environment variable that names the folder instead; an empty one means no cache."""
OWN = (
    *("cache", "checkpoints", "errors", "hashing", "inputs", "libraries", "modules"),
    *("polynomials", "running", "symbolic", "trace"),
)
"""The files of this package that a trace goes through."""
ENTRIES = 512
"""The most files in the folder; the ones that were not read for longest go first."""


def cached_trace(model: nn.Module, inputs: Inputs) -> Trace:
    """What :func:`~widthsearch.trace.trace` gives, read from disk where it is there.

    Where the folder cannot be written, or the model cannot be told by value, it is traced anew.

    Raises:
        TraceError: The model cannot be traced.
    """
    where = cache_folder("traces")
    key = None if where is None else key_of(model, inputs)
    if where is None or key is None:
        return trace(model, inputs)
    path = where / f"{key}.json"
    found = _read(path)
    if found is None:
        found = trace(model, inputs)
        _write(path, found)
    return found


def cache_folder(kind: str) -> Path | None:
    """Where what is of a kind is kept (``traces``, ``latency``, …); None if nothing is.

    In ``$WIDTHSEARCH_CACHE``, else ``$XDG_CACHE_HOME/widthsearch``, else ``~/.cache/widthsearch``.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given, kind) if given else None
    caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(caches, "widthsearch", kind)


def key_of(model: nn.Module, inputs: Inputs) -> str | None:
    """A hash of all that the model's trace depends on; None if something cannot be told."""
    sized = {
        id(tensor): name in module._buffers and has_content(module, name, tensor)
        for module, _, name, tensor in tensors_of(model)
    }
    try:
        walk = Walk(sized)
        return walk.digest(
            _own_code(),
            repr(settings()),
            tuple(put_into_torch()),
            (Tensor, nn.Parameter, nn.Module),  # a program may have given them members
            as_inputs(inputs),
            model,
        )
    except NoHash as reason:
        _logger.debug("the trace of a %s is not kept: %s", type(model).__name__, reason)
    except Exception as error:  # noqa: BLE001  objects of others may do anything when looked at
        _logger.debug("the trace of a %s is not kept: %r", type(model).__name__, error)
    return None


@functools.cache
def _own_code() -> str:
    files = [Path(__file__).with_name(f"{name}.py") for name in OWN]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


# -- files -------------------------------------------------------------------------------------


def _write(path: Path, trace: Trace) -> None:
    content = json.dumps(to_json(trace), separators=(",", ":")).encode()
    digest = hashlib.sha256(content).hexdigest().encode()
    try:
        write_atomically(path, lambda file: file.write(digest + b"\n" + content))
        kept = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)
        for file in kept[:-ENTRIES]:
            file.unlink()
    except OSError as error:
        _logger.debug("a trace cannot be kept: %s", error)


def _read(path: Path) -> Trace | None:
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
        if digest.decode() != hashlib.sha256(content).hexdigest():
            raise ValueError("it is not as it was written")
        found = from_json(json.loads(content))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _logger.debug("the trace in %s cannot be read: %s", path, error)
        return None
    with suppress(OSError):
        os.utime(path)
    return found


def to_json(trace: Trace) -> dict[str, Any]:
    """A trace as JSON values."""
    return {
        "axes": [[a.name, a.base, a.unit, a.layers, a.maker] for a in trace.axes],
        "pinned": [[p.name, p.size, p.reason, p.layers, p.places] for p in trace.pinned],
        "shapes": [[name, *map(_terms, shape)] for name, shape in trace.shapes.items()],
        "attributes": [[*where, _terms(poly)] for where, poly in trace.attributes.items()],
        "macs": _terms(trace.macs),
        "params": _terms(trace.params),
        "activations": _terms(trace.activations),
        "layer_macs": [[layer, _terms(poly)] for layer, poly in trace.layer_macs.items()],
    }


def from_json(content: Mapping[str, Any]) -> Trace:
    """What :func:`to_json` was given."""
    return Trace(
        axes=tuple(
            TracedAxis(name, base, unit, tuple(layers), (maker[0], maker[1]))
            for name, base, unit, layers, maker in content["axes"]
        ),
        pinned=tuple(
            Pinned(name, size, reason, tuple(layers), tuple((key, dim) for key, dim in places))
            for name, size, reason, layers, places in content["pinned"]
        ),
        shapes={name: tuple(map(_poly, shape)) for name, *shape in content["shapes"]},
        attributes={(layer, name): _poly(terms) for layer, name, terms in content["attributes"]},
        macs=_poly(content["macs"]),
        params=_poly(content["params"]),
        activations=_poly(content["activations"]),
        layer_macs={layer: _poly(terms) for layer, terms in content["layer_macs"]},
    )


def _terms(poly: Poly) -> list[list[int]]:
    return [[coefficient, *monomial] for monomial, coefficient in poly.items()]


def _poly(terms: Iterable[list[int]]) -> Poly:
    return {tuple(monomial): coefficient for coefficient, *monomial in terms}
