"""The configuration and the result of a latency measurement. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from widthsearch.utils.validation import validated_dataclass

BackendName = Literal["eager", "graph", "compile", "onnxruntime"]


@validated_dataclass("latency")
class LatencyConfig:
    """How latency is measured.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        backend: The engine that runs the network: ``eager`` is plain PyTorch, ``graph`` a CUDA
            graph of it, ``compile`` torch.compile (up to a minute per network; needs a C++ compiler
            on a CPU), ``onnxruntime`` ONNX Runtime on a CPU in float32.
        batch_size: Samples per run.
        threads: CPU threads.
        dtype: The type of weights and floating-point inputs.
        pairs: The number of pairs of blocks, one of the network and one of the base model. An
            accuracy of ±2% needs 40 to 80 on a CPU.

    Raises:
        StudyError: A value breaks a rule.

    Example:
        >>> LatencyConfig(batch_size=8).backend
        'eager'
        >>> LatencyConfig(backend="graph")
        Traceback (most recent call last):
        widthsearch.errors.StudyError: latency: backend 'graph' needs a CUDA device, but device is \
'cpu'; set the backend to eager
    """

    device: str = "cpu"
    backend: BackendName = "eager"
    batch_size: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    pairs: int = Field(default=40, ge=4)

    @model_validator(mode="after")
    def _check(self) -> Self:
        on_cpu = self.device == "cpu"
        if self.backend == "graph" and on_cpu:
            raise ValueError(
                "backend 'graph' needs a CUDA device, but device is 'cpu'; set the backend to eager"
            )
        if self.backend == "onnxruntime" and not (on_cpu and self.dtype == "float32"):
            raise ValueError(
                "backend 'onnxruntime' needs device 'cpu' and dtype 'float32', but they are "
                f"{self.device!r} and {self.dtype!r}; set the backend to eager"
            )
        return self


@dataclass(frozen=True)
class Latency:
    """A network's inference latency, relative to a base model that was measured alongside.

    The time of a block is the median of its runs; the ratio of a pair is the time of the network's
    block over that of the base model's block next to it.

    Attributes:
        median_ms: The time of one run in milliseconds: ratio × base_ms.
        spread_ms: The spread of that time: ratio_spread × base_ms.
        ratio: The median ratio over the pairs.
        ratio_spread: Half the interquartile range of the ratios over the pairs. The median itself
            is more accurate, by about the square root of the number of pairs.
        base_ms: The base model's median block time, measured once per study.
        device: As configured.
        hardware: The name of the CPU or GPU.
        backend: As configured.
        batch_size: Samples per run.
        dtype: As configured.
        memory_format: ``channels_last`` for a network of images that supports it, else
            ``contiguous``.
        threads: CPU threads.
        pairs: The number of pairs of blocks.
        clock_mhz: The GPU's clock after the measurement, where it can be read; it is never set.

    Example:
        >>> from torch import nn
        >>> from widthsearch.latency.meter import LatencyMeter
        >>> base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> latency = LatencyMeter(base, (3, 16, 16), LatencyConfig(pairs=4)).measure(base)
        >>> latency.median_ms == latency.ratio * latency.base_ms
        True
        >>> Latency.from_json(latency.to_json()) == latency
        True
    """

    median_ms: float
    spread_ms: float
    ratio: float
    ratio_spread: float
    base_ms: float
    device: str
    hardware: str
    backend: str
    batch_size: int
    dtype: str
    memory_format: str
    threads: int
    pairs: int
    clock_mhz: int | None = None

    @property
    def standard_error_ms(self) -> float:
        """The standard error of the median in ms.

        For normal noise, half the interquartile range is 0.6745 σ, and the standard error of the
        median of n pairs is √(π/2) σ / √n.
        """
        return math.sqrt(math.pi / 2) / 0.6745 * self.spread_ms / math.sqrt(self.pairs)

    def to_json(self) -> dict[str, Any]:
        """Every field by its name."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Latency:
        """Inverse of :meth:`to_json`; a ValueError if something else wrote the fields."""
        return TypeAdapter(cls).validate_python(fields)
