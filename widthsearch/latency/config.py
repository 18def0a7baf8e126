"""How latency is measured, and what a measurement is. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from widthsearch.errors import StudyError

Backend = Literal["eager", "graph", "compile", "onnxruntime"]


@dataclass(frozen=True)
class LatencyConfig:
    """How latency is measured.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        backend: What runs the network: ``eager`` is PyTorch as it is, ``graph`` a CUDA graph of it,
            ``compile`` torch.compile (it takes up to a minute a network, and a C++ compiler on a
            CPU), ``onnxruntime`` ONNX Runtime on a CPU in float32.
        batch_size: Images a run.
        threads: CPU threads.
        dtype: Of weights and images.
        pairs: How often the network and the base model take turns; ±2% needs 40 to 80 on a CPU.
    """

    device: str = "cpu"
    backend: Backend = "eager"
    batch_size: int = 1
    threads: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    pairs: int = 40

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "threads": 1, "pairs": 4}.items():
            if getattr(self, name) < least:
                raise StudyError(
                    f"`{name} >= {least}` must hold, but latency has {name}={getattr(self, name)}"
                )
        for name, choices in {
            "backend": get_args(Backend),
            "dtype": ("float32", "bfloat16"),
        }.items():
            if getattr(self, name) not in choices:
                raise StudyError(
                    f"`{name}` must be {' or '.join(choices)}, but latency has "
                    f"{name}={getattr(self, name)!r}"
                )
        on_cpu, fp32 = self.device == "cpu", self.dtype == "float32"
        for backend, rule, holds in (
            ("graph", "needs a CUDA device", not on_cpu),
            ("onnxruntime", "needs device='cpu'", on_cpu),
            ("onnxruntime", "needs dtype='float32'", fp32),
        ):
            if self.backend == backend and not holds:
                raise StudyError(
                    f"latency's backend {backend!r} {rule}, but latency has "
                    f"device={self.device!r} and dtype={self.dtype!r}"
                )


@dataclass(frozen=True)
class Latency:
    """A network's inference latency, and what it was measured on.

    A block's time is the median of its runs.

    Attributes:
        median_ms: Time of one run in milliseconds on the base model's scale: ratio × base_ms.
        spread_ms: Its spread: ratio_spread × base_ms.
        ratio: Median over the pairs of the network's block over the base model's beside it.
        ratio_spread: Half the interquartile range of that over the pairs: about half of them lie
            within one spread of the median. The median itself is surer, by about the square root
            of their number.
        base_ms: The base model's median block, measured once in a study.
        device: As it was asked for.
        hardware: The device's name as it gives it.
        backend: What ran the network.
        batch_size: Images a run.
        dtype: Of weights and images.
        memory_format: ``channels_last`` where the network can take it, else ``contiguous``.
        threads: CPU threads.
        pairs: How often the two took turns.
        clock_mhz: The GPU's clock after measuring, where it can be read; it is never set.
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

    def to_json(self) -> dict[str, Any]:
        """Every field by its name."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Latency:
        """What :meth:`to_json` gave."""
        return cls(**fields)
