"""Precision, memory formats, randomness, threads and cuDNN."""

from __future__ import annotations

import pytest
import torch

from widthsearch.utils.devices import (
    autocast,
    check_device,
    deterministic_cudnn,
    fixed_threads,
    format_name,
    seeded,
)

CPU = torch.device("cpu")


def test_precision_is_autocast() -> None:
    """bf16 makes products bf16; fp32, and auto on a CPU without a probe, do not."""
    x = torch.ones(2, 2)
    for precision, dtype in (
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("auto", torch.float32),
    ):
        with autocast(CPU, precision):  # type: ignore[arg-type]
            assert (x @ x).dtype is dtype


@pytest.mark.gpu
def test_auto_is_bf16_where_the_gpu_has_it() -> None:
    """In hardware, because emulation is slower than fp32."""
    device = check_device("cuda")
    x = torch.ones(2, 2, device=device)
    with autocast(device, "auto"):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        assert (x @ x).dtype is (torch.bfloat16 if bf16 else torch.float32)


def test_memory_formats_have_names() -> None:
    """As in a measurement's record."""
    assert format_name(torch.channels_last) == "channels_last"
    assert format_name(torch.contiguous_format) == "contiguous"


def test_seed_and_epoch_determine_random_numbers() -> None:
    """Separately for data and model; torch's generator is restored."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = set()
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        with seeded(seed, epoch, CPU) as generator:
            drawn.add((torch.rand(()).item(), torch.rand((), generator=generator).item()))
    assert len(drawn) == 3
    assert len({value for pair in drawn for value in pair}) == 6
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_an_epoch_restores_the_generator_of_the_gpu() -> None:
    """It is seeded during the epoch."""
    device = check_device("cuda")
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state(device)
    drawn = []
    for _ in range(2):
        with seeded(0, 1, device):
            drawn.append(torch.rand((), device=device).item())
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.cuda.get_rng_state(device), before)


def test_threads_and_cudnn_are_restored() -> None:
    """Even after an error."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with pytest.raises(ZeroDivisionError), fixed_threads(threads + 1), deterministic_cudnn():
        assert torch.get_num_threads() == threads + 1
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
        _ = 1 / 0
    assert torch.get_num_threads() == threads
    assert (cudnn.deterministic, cudnn.benchmark) == before
