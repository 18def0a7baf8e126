"""Devices, and how a network is run on one: threads, randomness, precision, memory format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from widthsearch.errors import DeviceError


def check_device(name: str) -> torch.device:
    """The device of that name: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DeviceError: It is not there.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "cuda" and len(there) > 1:
        return torch.device("cuda", torch.cuda.current_device())
    if name not in there:
        raise DeviceError(
            f"a device must be there, but {name!r} is not; this machine has {', '.join(there)}"
        )
    return torch.device(name)


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def uses_bf16(device: torch.device, precision: str) -> bool:
    """Whether a precision (``auto``, ``fp32`` or ``bf16``) means bf16 on a device."""
    if precision == "auto" and device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return precision == "bf16"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that runs a network in a precision (``auto``, ``fp32`` or ``bf16``)."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(device, precision))


def pick_memory_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """The layout that a network runs fastest in: channels_last, where it can take it.

    On a CPU with AVX-512 that is 1.2 times as fast as contiguous in fp32 (ResNet-20 in training,
    ResNet-18 at inference), and CUDA's bf16 kernels want it. A network that calls ``view`` on a
    feature map cannot take it, and says so when it is run.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: what a model keeps from here must train later
            model(images.to(memory_format=torch.channels_last))
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        return torch.contiguous_format
    finally:
        model.train(training)
    return torch.channels_last


def format_name(layout: torch.memory_format) -> str:
    """``channels_last`` or ``contiguous``."""
    return str(layout).removeprefix("torch.").removesuffix("_format")


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[torch.Generator]:
    """A CPU generator of an epoch's own; torch's generators are seeded too, and put back after."""
    words = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64) >> np.uint64(1)
    of_data, of_model = words.tolist()
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus, device_type="cuda"):
        torch.default_generator.manual_seed(of_model)  # torch.manual_seed would seed every GPU
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(of_model)
        yield torch.Generator().manual_seed(of_data)


@contextmanager
def fixed_threads(threads: int | None) -> Iterator[None]:
    """Run with so many CPU threads; None leaves torch's number."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Let cuDNN neither choose kernels by timing them nor take any that adds in any order."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
