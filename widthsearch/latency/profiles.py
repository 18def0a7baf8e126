"""Latency profiles: measurements of a designed set of a space's networks on one device.

A profile is one JSON file in the cache folder ``latency`` (see ``utils.files.cache_folder``). Its
name has a hash of everything that latency depends on. The file is replaced atomically after every
network, so an interrupted profile continues later.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError
from rich.table import Table
from scipy.stats import qmc

from widthsearch.errors import StudyError, first_line, writing
from widthsearch.latency.config import LatencyConfig
from widthsearch.latency.meter import LatencyMeter
from widthsearch.latency.predictor import LatencyPredictor, PredictionErrors
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.devices import check_device, hardware_name
from widthsearch.utils.files import VARIABLE, cache_folder, write_atomically
from widthsearch.utils.validation import explain
from widthsearch.widths import Widths

_BLOCKS = (1, 8, 16, 32)  # the widths of designed networks are multiples of these, in turns


@dataclass(frozen=True)
class _Profile:
    """The content of a file."""

    space: str
    fingerprint: str
    setting: dict[str, Any]
    base_ms: float | None
    vectors: list[list[Annotated[int, Field(ge=0, lt=2**31)]]]
    ms: list[Annotated[float, Field(ge=1e-9, le=1e9)]]  # so that no square overflows
    sd: list[Annotated[float, Field(ge=0, le=1e9)]]
    errors: PredictionErrors | None


_PROFILE = TypeAdapter(_Profile)


def measure_profile(
    space: SearchSpace,
    config: LatencyConfig,
    *,
    vectors: int = 40,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatencyPredictor:
    """Measure designed networks until a profile has enough, and fit a predictor to them.

    Args:
        space: The space.
        config: Device and method of the measurements.
        vectors: The size of the profile; networks that it already has are not measured again.
        on_progress: Called before each measurement with the number of measured networks and the
            size of the profile.

    Raises:
        DeviceError: The device does not exist.
        StudyError: The profile's file cannot be read, or its folder cannot be written.
    """
    if vectors < 1:
        raise StudyError(f"`vectors >= 1` must hold, but vectors={vectors}")
    path = profile_path(space, config)
    content = _read(path) or {
        "space": space.name,
        "fingerprint": space.fingerprint,
        "setting": _setting(space, config),
        "base_ms": None,
        "vectors": [],
        "ms": [],
        "sd": [],
        "errors": None,
    }
    seen = {tuple(vector) for vector in content["vectors"]}
    missing = [w for w in design(space, vectors) if w.vector not in seen]
    missing = missing[: max(0, vectors - len(seen))]
    if missing:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=path.parent).close()
        base = space.build(space.base, seed=0)
        meter = LatencyMeter(base, space.input_shape, config, content["base_ms"])
        for done, widths in enumerate(missing, len(seen)):
            if on_progress is not None:
                on_progress(done, len(seen) + len(missing))
            latency = meter.measure(space.build(widths, seed=0))
            content["base_ms"] = latency.base_ms
            content["vectors"].append(list(widths.vector))
            content["ms"].append(latency.median_ms)
            content["sd"].append(latency.standard_error_ms)
            content["errors"] = None
            _write(path, content)
    model = LatencyPredictor.from_json(space, content)
    if content["errors"] is None and model.networks >= 3:
        _write(path, {**content, "errors": asdict(model.errors)})
    return model


def load_profile(space: SearchSpace, config: LatencyConfig) -> LatencyPredictor | None:
    """The predictor of a stored profile for this device; None if there is no profile.

    Raises:
        DeviceError: The device does not exist.
        StudyError: The profile's file cannot be read.
    """
    if cache_folder("latency") is None:
        return None
    content = _read(profile_path(space, config))
    return None if content is None else LatencyPredictor.from_json(space, content)


def profile_path(space: SearchSpace, config: LatencyConfig) -> Path:
    """The file of a space's profile for a device, backend, batch size, dtype and threads.

    Raises:
        DeviceError: The device does not exist.
        StudyError: The cache is turned off.
    """
    folder = cache_folder("latency")
    if folder is None:
        raise StudyError(
            f"a latency profile is stored in the cache, but {VARIABLE} is empty, which turns the "
            "cache off: unset it, or set it to a folder"
        )
    key = json.dumps(_setting(space, config), sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', space.name)}-{digest}.json"


def design(space: SearchSpace, count: int) -> list[Widths]:
    """Networks whose latencies identify axes and blocks; each prefix is a good design, too.

    First the base, the minimum and the maximum widths. Then networks whose scale, and each axis's
    share of it, come from a scrambled Sobol sequence (Owen, Scrambling Sobol' and Niederreiter-Xing
    Points, Journal of Complexity 14, 1998): all axes vary in each, so each measurement informs
    about all of them. In turns the widths are arbitrary and whole blocks of 8, 16 and 32, because
    only both together show a block size.

    Returns:
        ``count`` different width vectors; fewer if the space has fewer.
    """
    axes = space.axes
    base, least, most = np.array([(a.base, a.min_width, a.max_width) for a in axes]).T
    out = [space.base, space.nearest(least), space.nearest(most)]
    low, high = np.log((least / base).min()), np.log((most / base).max())
    points = qmc.Sobol(len(axes) + 1, rng=0).random_base2(math.ceil(math.log2(4 * count)))
    for i, (scale, *shares) in enumerate(points):
        jitter = np.log(2) * (2 * np.array(shares) - 1)
        widths = base * np.exp(low + (high - low) * scale + jitter)
        block = _BLOCKS[i % len(_BLOCKS)]
        whole = np.round(widths / block) * block
        widths = np.where((whole >= least) & (whole <= most), whole, widths)
        out.append(space.nearest(widths))
    return list(dict.fromkeys(out))[:count]


def profile_table(model: LatencyPredictor) -> Table:
    """A table of the predicted latency around the base's width of each axis.

    Its title names the device's block of channels, its caption the errors out of sample.
    """
    base = model.space.base
    mean, sd = model(np.array(base.vector))
    blocks = ", ".join(f"{block} ({p:.0%})" for block, p in model.blocks.items())
    title = f"predicted latency {mean:.3g} ± {sd:.1g} ms; blocks of {blocks} channels"
    caption = (
        "Blocks: the device computes each width rounded up to a whole number of them, so that "
        "channels up to the next block cost no latency; in brackets the probability of each size."
    )
    if model.networks >= 3:
        e = model.errors
        caption = (
            f"{e.networks} networks, each predicted from the others: median error {e.median:.1%} "
            f"(MACs alone {e.median_macs:.1%}), Kendall τ {e.tau:.2f} (MACs {e.tau_macs:.2f}), "
            f"{e.coverage:.0%} inside the 90% intervals. {caption} Kendall τ: 1 where predictions "
            "order the networks as measurements do, 0 where the order is as by chance."
        )
    table = Table("axis", title=title, caption=caption)
    for column in ("width", "one step less", "one step more", "same latency from", "to"):
        table.add_column(column, justify="right")
    for stair in model.stairs(base):
        changes = [
            "" if ms is None else f"{ms / stair.ms - 1:+.1%}"
            for ms in (stair.less_ms, stair.more_ms)
        ]
        down = str(stair.flat_from) if stair.flat_from < stair.width else ""
        up = str(stair.flat_to) if stair.flat_to > stair.width else ""
        table.add_row(stair.name, str(stair.width), *changes, down, up)
    return table


def _setting(space: SearchSpace, config: LatencyConfig) -> dict[str, Any]:
    """Everything that a network's latency depends on besides its widths."""
    return {
        **{key: value for key, value in asdict(config).items() if key != "pairs"},
        "hardware": hardware_name(check_device(config.device)),
        "torch": torch.__version__,
        "fingerprint": space.fingerprint,
        "input": repr(space.input_shape),
    }


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = asdict(_PROFILE.validate_json(path.read_bytes(), strict=True))
        vectors = content["vectors"]
        if (
            len(vectors) == len(content["ms"]) == len(content["sd"])
            and len({*map(len, vectors)}) == 1
        ):
            return content
        reason = "it holds no measurements, or of different spaces"
    except ValidationError as error:
        reason = explain(error, {"": _Profile})
    except OSError as error:
        reason = first_line(error)
    raise StudyError(f"the profile {str(path)!r} cannot be read ({reason}): remove it")


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content)
    with writing(path.parent):
        write_atomically(path, lambda file: file.write(text.encode()))
