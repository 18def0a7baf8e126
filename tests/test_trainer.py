"""The trainer: learning, schedules, repeated and resumed trainings, checkpoints, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from digits import convnet, digits, few, finish, untimed, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from widthsearch.data.sources import Split
from widthsearch.errors import DataError, DeviceError, StudyError
from widthsearch.training.recipe import EpochResult, Recipe
from widthsearch.training.sgd import parameter_groups
from widthsearch.training.trainer import Trainer, evaluate, fit
from widthsearch.utils.devices import check_device, fixed_threads, pick_memory_format

QUICK = Recipe(epochs=4, batch_size=32, lr=0.1)


# --- learning ---


def test_a_small_network_learns_digits() -> None:
    """Six epochs give two convolutions more than 95% on validation and 93% on test."""
    model = convnet()
    seen: list[EpochResult] = []
    curve = fit(model, digits(), replace(QUICK, epochs=6), seed=0, on_epoch=seen.append)
    assert tuple(seen) == curve
    assert [result.epoch for result in curve] == [1, 2, 3, 4, 5, 6]
    assert curve[-1].value > 95
    assert curve[-1].loss < curve[0].loss / 3
    assert evaluate(model, digits(), "validation") == curve[-1].value
    assert evaluate(model, digits(), "test") > 93


@pytest.mark.parametrize(
    "recipe",
    [
        replace(QUICK, schedule="one_cycle", label_smoothing=0.1),
        replace(QUICK, precision="bf16"),
        replace(QUICK, nesterov=False, momentum=0.0, lr=0.3),
    ],
    ids=["one_cycle", "bf16", "plain"],
)
def test_every_recipe_learns(recipe: Recipe) -> None:
    """One-cycle with label smoothing, bf16 on a CPU, and plain SGD all reach 85%."""
    assert fit(convnet(), digits(), recipe, seed=0)[-1].value > 85


def test_label_smoothing_raises_the_minimum_of_the_loss() -> None:
    """With labels smoothed by 0.5 over 10 classes, their entropy is a lower bound."""
    entropy = -(0.55 * math.log(0.55) + 9 * 0.05 * math.log(0.05))
    curve = fit(convnet(), few(), replace(QUICK, label_smoothing=0.5), seed=0)
    assert entropy < curve[-1].loss < math.log(10)


def test_only_weights_decay() -> None:
    """Two dimensions or more decay, biases and BatchNorm do not; frozen parameters are ignored."""
    model = convnet()
    first = next(model.parameters())
    first.requires_grad_(False)
    decayed, others = parameter_groups(model, 5e-4)
    assert (decayed["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["3.weight", "8.weight"]
    assert [names[id(p)] for p in others["params"]] == [
        *("1.weight", "1.bias", "3.bias", "4.weight", "4.bias", "8.bias")
    ]


# --- the schedule ---


def test_learning_rates_by_hand() -> None:
    """Warm-up to the peak, then half a cosine or a line to zero, or a constant."""
    for schedule, falls in (
        ("cosine", [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]),
        ("one_cycle", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("constant", [1] * 6),
    ):
        recipe = Recipe(epochs=2, lr=1.0, warmup_epochs=0.5, schedule=schedule)  # type: ignore[arg-type]
        rates = [recipe.learning_rate(step, 4) for step in range(8)]
        assert rates == pytest.approx([1 / 3, 2 / 3, *falls])
    assert Recipe(epochs=20).warmup == 2
    assert Recipe(epochs=20, schedule="one_cycle").warmup == 6


@given(
    st.integers(1, 30),
    st.integers(1, 50),
    st.sampled_from(["cosine", "one_cycle"]),
    st.floats(0, 0.99),
)
def test_learning_rates_rise_to_the_peak_once_and_fall(
    epochs: int, steps: int, schedule: Any, share: float
) -> None:
    """Positive, ascending up to lr, descending afterwards."""
    recipe = Recipe(epochs=epochs, lr=0.4, schedule=schedule, warmup_epochs=share * epochs)
    rates = [recipe.learning_rate(step, steps) for step in range(epochs * steps)]
    if round(share * epochs * steps) == epochs * steps:
        return  # rounding leaves no step after the warm-up
    peak = rates.index(max(rates))
    assert min(rates) > 0
    assert rates[peak] == 0.4
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


# --- the same numbers ---


def test_the_same_seed_gives_the_same_numbers() -> None:
    """Curves and weights agree bit for bit; torch's generator is unchanged."""
    recipe = replace(QUICK, epochs=2)
    models = [convnet(dropout=0.2) for _ in range(3)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = fit(models[0], few(), recipe, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert untimed(fit(models[1], few(), recipe, seed=5)) == untimed(first)
    assert weights(models[1]) == weights(models[0])
    assert untimed(fit(models[2], few(), recipe, seed=6)) != untimed(first)


@pytest.mark.parametrize(
    ("precision", "device"),
    [("fp32", "cpu"), ("bf16", "cpu"), pytest.param("auto", "cuda", marks=pytest.mark.gpu)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(precision: Any, device: str) -> None:
    """After two of four epochs the state is loaded into a new network: equal, bit for bit."""
    recipe = replace(QUICK, precision=precision)
    whole = convnet(dropout=0.2)
    curve = fit(whole, few(), recipe, seed=1, device=device)
    run = Trainer(convnet(dropout=0.2), few(), recipe, seed=1, device=device)
    run.run_epoch()
    run.run_epoch()
    state = run.state()
    model = convnet(seed=99, dropout=0.2)  # the weights are overwritten
    resumed = Trainer(model, few(), recipe, seed=1, device=device)
    resumed.restore(state, run.curve)
    assert resumed.epoch == 2
    assert resumed.curve == run.curve
    finish(resumed)
    assert untimed(resumed.curve) == untimed(curve)
    assert weights(model) == weights(whole)


@pytest.mark.parametrize(("precision", "shown"), [("auto", "fp32"), ("bf16", "bf16")])
def test_the_mode_names_precision_and_execution(precision: Any, shown: str) -> None:
    """Precision, memory format, and eager steps on a CPU."""
    run = Trainer(convnet(), few(), replace(QUICK, precision=precision), seed=0)
    run.run_epoch()
    assert run.mode == run.curve[-1].mode == f"{shown}, channels_last, eager"
    viewing = Trainer(Viewing(), few(), replace(QUICK, precision=precision), seed=0)
    assert viewing.mode == f"{shown}, contiguous, eager"


def test_threads_are_set_only_during_training() -> None:
    """The number of threads applies during an epoch, and is restored."""
    seen: list[int] = []
    model = convnet()
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    with fixed_threads(1):
        run = Trainer(model, few(), replace(QUICK, epochs=1), seed=0, threads=2)
        run.run_epoch()
        assert torch.get_num_threads() == 1
    assert set(seen) == {2}


# --- divergence ---


def test_divergence_reports_nan_and_ends_the_training() -> None:
    """A loss that is not finite gives accuracy NaN, and no further epoch."""
    curve = fit(convnet(), few(), replace(QUICK, lr=1e30), seed=0)
    assert len(curve) == 1
    assert math.isnan(curve[0].value)
    assert not math.isfinite(curve[0].loss)


def test_logits_that_are_not_finite_have_no_accuracy() -> None:
    """argmax would count NaN as a class; the accuracy is NaN instead."""
    model = convnet()
    assert math.isfinite(evaluate(model, few(), "validation"))
    with torch.no_grad():
        model[-1].bias[3] = math.nan  # type: ignore[index, union-attr, operator]
    assert math.isnan(evaluate(model, few(), "validation"))


# --- evaluation ---


class Constant(nn.Module):
    """Predicts one class, and records its inputs."""

    def __init__(self, label: int, classes: int = 10) -> None:
        super().__init__()
        self.label, self.classes = label, classes
        self.modes: set[tuple[bool, bool]] = set()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to one-hot (N, classes)."""
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        self.seen += len(x)
        label = torch.full((len(x),), self.label)
        return nn.functional.one_hot(label, self.classes).float()


def test_evaluation_counts_every_image_once() -> None:
    """A constant class is right as often as it occurs; the training mode is restored."""
    model = Constant(3)
    images = np.zeros((3000, 1, 16, 16), dtype=np.uint8)
    split = Split(images, np.arange(3000) % 7)
    blank = replace(digits(), train=split, validation=split, test=split)
    assert evaluate(model, blank, "test") == pytest.approx(100 * (split.labels == 3).mean())
    assert model.seen == 3000 + 2 * 2  # two blank images, twice, to check the model
    assert model.modes == {(False, False), (False, True)}
    assert model.training


def test_a_search_has_no_test_split() -> None:
    """Evaluating on it is refused."""
    with pytest.raises(DataError, match="task 'digits' has no test split here"):
        evaluate(convnet(), digits().for_search(), "test")


# --- errors ---


def test_a_network_that_does_not_fit_the_task() -> None:
    """Wrong channels or too few classes: the error is one line with the task and the shape."""
    for model, message in (
        (nn.Conv2d(3, 8, 3), r"fails on those of 'digits', \(1, 8, 8\): .*expected input"),
        (Constant(0, classes=5), r"logits of shape \(N, 10\) .*it returns \(2, 5\); give its last"),
        (nn.Conv2d(1, 10, 3), r"for 2 images it returns \(2, 10, 6, 6\)"),
    ):
        with pytest.raises(DataError, match=message) as error:
            Trainer(model, digits(), QUICK, seed=0)
        assert "\n" not in str(error.value)


class Viewing(nn.Module):
    """Flattens a feature map by ``view``, which needs contiguous memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        x = self.conv(x)
        return self.fc(x.view(len(x), -1))


def test_a_network_without_channels_last_trains() -> None:
    """The memory format is chosen by trying; the network's mode is unchanged."""
    model = Viewing()
    blank = torch.zeros(1, 1, 8, 8)
    assert pick_memory_format(model, blank) is torch.contiguous_format
    assert pick_memory_format(convnet(), blank) is torch.channels_last
    assert model.training
    assert fit(model, few(), replace(QUICK, epochs=1), seed=0)[0].value > 10


@pytest.mark.parametrize(
    ("capability", "channels", "stride", "layout"),
    [
        ("AVX2", 4, 2, torch.contiguous_format),
        ("DEFAULT", 7, (1, 2), torch.contiguous_format),
        ("AVX2", 8, 2, torch.channels_last),
        ("AVX2", 4, 1, torch.channels_last),
        ("AVX512", 4, 2, torch.channels_last),
    ],
)
def test_shortcuts_that_overwrite_memory_are_contiguous(
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    channels: int,
    stride: Any,
    layout: torch.memory_format,
) -> None:
    """oneDNN writes beyond a buffer in the backward pass of narrow, strided 1x1 convolutions."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = nn.Sequential(nn.Conv2d(1, channels, 3), nn.Conv2d(channels, 4, 1, stride))
    assert pick_memory_format(model, torch.zeros(1, 1, 8, 8)) is layout


def test_a_narrow_network_with_strided_shortcuts_trains() -> None:
    """It ended the process where it was trained in channels_last, without AVX-512."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 1, 2), nn.Flatten(), nn.Linear(54, 10)
    )
    for seed in range(3):
        assert math.isfinite(fit(model, few(), replace(QUICK, epochs=2), seed=seed)[-1].value)


def test_a_batch_larger_than_the_training_split_is_refused() -> None:
    """An epoch would silently be one step on fewer images than the recipe names."""
    message = "batch_size=4096 and task 'digits' has 1079 training images; lower the recipe's"
    with pytest.raises(StudyError, match=message):
        Trainer(convnet(), digits(), replace(QUICK, batch_size=4096), seed=0)
    assert Trainer(convnet(), digits(), replace(QUICK, batch_size=1079), seed=0).epoch == 0


def test_a_missing_device_is_refused() -> None:
    """The error lists the existing devices."""
    assert check_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "cdua"):
        with pytest.raises(DeviceError, match=f"'{name}' does not; this machine has cpu"):
            Trainer(convnet(), few(), QUICK, seed=0, device=name)


def test_an_integer_learning_rate_trains_like_a_float() -> None:
    """An integer tensor would truncate the schedule's values."""
    whole, real = (fit(convnet(), few(), replace(QUICK, lr=lr), seed=0) for lr in (1, 1.0))
    assert untimed(whole) == untimed(real)
