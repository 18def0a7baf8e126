"""Devices, and the state that a network runs in: threads, randomness, precision, memory format."""

from __future__ import annotations

import os
import platform
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from widthsearch.errors import DeviceError
from widthsearch.torch_internals import TorchDispatchMode


def check_device(name: str) -> torch.device:
    """The device with a name: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DeviceError: The device does not exist.
    """
    existing = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "cuda" and len(existing) > 1:
        return torch.device("cuda", torch.cuda.current_device())
    if name not in existing:
        raise DeviceError(
            f"a device must exist, but {name!r} does not; this machine has {', '.join(existing)}"
        )
    return torch.device(name)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(name: str, share: float = 1.0) -> dict[str, int]:
    """The free bytes of the memories that a training on a device uses, by the memory's name.

    Args:
        name: The device; a GPU that is not here is left out.
        share: The share of a GPU that the training has.

    Example:
        >>> list(free_memory("cpu"))
        ['memory']
    """
    found = {"memory": _free_host_memory()}
    if name.startswith("cuda") and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(check_device(name))
        found[f"memory of {name}"] = int(share * free)
    return found


def _free_host_memory() -> int:
    """The bytes that processes can still take, within the limits of this one's control groups."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1]
    except (OSError, StopIteration):  # another system: most of its memory counts as free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    root = Path("/sys/fs/cgroup")
    folder = root / group.rpartition(":")[2].lstrip("/")
    for each in (folder, *folder.parents):
        if not each.is_relative_to(root):
            break
        try:
            limit, used = (
                int((each / file).read_text()) for file in ("memory.max", "memory.current")
            )
            stat = (each / "memory.stat").read_text().split()
        except (OSError, ValueError):  # the file is not there, or the limit is "max"
            continue
        cache = int(stat[stat.index("inactive_file") + 1])  # is given back where memory is short
        free = min(free, limit - used + cache)
    return max(0, free)


def hardware_name(device: torch.device) -> str:
    """The model name of the GPU or the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or "x86_64" on Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measurement_lock(device: torch.device) -> FileLock:
    """The machine-wide lock of a device for measurements; the system frees it with its process.

    A GPU has a lock by its UUID, because ``CUDA_VISIBLE_DEVICES`` renumbers GPUs per process. The
    CPU has one lock. All users of the machine share these locks, so the files are writable by all.
    """
    name = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
    return FileLock(Path(tempfile.gettempdir(), f"widthsearch-latency-{name}.lock"), mode=0o666)


def uses_bf16(device: torch.device, precision: str) -> bool:
    """Whether a precision (``auto``, ``fp32`` or ``bf16``) means bf16 on a device."""
    if precision == "auto" and device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return precision == "bf16"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that runs a network in a precision (``auto``, ``fp32`` or ``bf16``)."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(device, precision))


def pick_memory_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """The fastest memory format of a network: channels_last if the network supports it.

    On a CPU with AVX-512 it is 1.2 times as fast as contiguous in fp32 (ResNet-20 in training,
    ResNet-18 at inference), and CUDA's bf16 kernels require it. A network that calls ``view`` on a
    feature map does not support it and raises; and on some CPUs one with a convolution that torch
    computes wrongly, see :class:`_UnsafeConvolutions`.
    """
    training = model.training
    model.eval()
    unsafe = _UnsafeConvolutions()
    try:
        # No inference mode: a tensor that the model caches must be trainable.
        with torch.no_grad(), unsafe:
            model(images.to(memory_format=torch.channels_last))
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return torch.contiguous_format
    finally:
        model.train(training)
    return torch.contiguous_format if unsafe.found else torch.channels_last


class _UnsafeConvolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds convolutions whose gradient, in channels_last, overwrites memory on this CPU.

    oneDNN's kernel for the weights of a 1×1 convolution with a stride, of fewer than 8 channels, in
    fp32 and without AVX-512, writes beyond its buffer (torch 2.14.1 with ``AVX2``: the process ends
    with "corrupted double-linked list", or goes on with wrong numbers). A narrow network has such
    convolutions in its shortcuts. In the contiguous format oneDNN takes another kernel.

    Attributes:
        found: Whether there was one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, *_ = args
            self.found |= (
                x.device.type == "cpu"
                and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
                and weight.dim() == 4
                and tuple(weight.shape[2:]) == (1, 1)
                and weight.shape[1] < 8
                and max(stride) > 1
            )
        return func(*args, **(kwargs or {}))


def format_name(layout: torch.memory_format) -> str:
    """``channels_last`` or ``contiguous``."""
    return str(layout).removeprefix("torch.").removesuffix("_format")


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[torch.Generator]:
    """Seed torch's generators for an epoch, and restore them afterwards.

    Args:
        seed: The seed of the training.
        epoch: The epoch's number.
        device: Its generator is seeded with the CPU's.

    Yields:
        A CPU generator for the data, independent of torch's, which are the model's.
    """
    words = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64) >> np.uint64(1)
    data_seed, model_seed = words.tolist()
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus, device_type="cuda"):
        torch.default_generator.manual_seed(model_seed)  # torch.manual_seed would seed every GPU
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(model_seed)
        yield torch.Generator().manual_seed(data_seed)


def reseed(seed: int, epoch: int) -> None:
    """Seed torch's, numpy's and Python's global generators for an epoch."""
    words = np.random.SeedSequence((seed, epoch)).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002  a user's code draws from it
    random.seed(int(words[2]))


@contextmanager
def restored_generators(device: torch.device) -> Iterator[None]:
    """Restore torch's, numpy's and Python's global generators at the end."""
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(
            devices=[device] if device.type == "cuda" else [], device_type="cuda"
        ):
            yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])


@contextmanager
def fixed_threads(threads: int | None) -> Iterator[None]:
    """Set the number of CPU threads; None leaves torch's number."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Restrict cuDNN to deterministic kernels, and do not let it choose kernels by timing."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
