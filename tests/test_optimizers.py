"""Optimizers of a recipe: torch's own numbers, exact resume, clipping, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conformance import small_task
from digits import convnet, few, finish, untimed, weights
from strategies import space_of
from torch.nn import functional as F

from widthsearch.api import Study
from widthsearch.data.loaders import DeviceLoader
from widthsearch.errors import StudyError
from widthsearch.study.config import StudyConfig
from widthsearch.training.checkpoints import read_checkpoint, write_checkpoint
from widthsearch.training.optimizers import check_optimizer
from widthsearch.training.recipe import Recipe, recipe_values
from widthsearch.training.sgd import SgdSteps, parameter_groups
from widthsearch.training.trainer import Trainer, fit

ADAMW = Recipe(epochs=3, batch_size=32, optimizer="adamw", lr=0.01)
CPU = torch.device("cpu")

EVERY = [
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("NAdam", "RAdam", "RMSprop", "Rprop"),
]
"""Every class of ``torch.optim`` that a recipe can name, beside SGD."""


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_takes_torchs_own_steps(clip_norm: float | None) -> None:
    """Bit for bit those of a literal loop: its rates, weight decay by parameter, clipped norm."""
    task, space = small_task(), space_of("Residual")
    recipe = Recipe(batch_size=40, optimizer="adamw", weight_decay=0.1, clip_norm=clip_norm)
    rates = [0.01, 0.005, 0.002, 0.02]
    model, literal = (space.build(space.base, seed=0).train() for _ in range(2))
    loader = DeviceLoader(task.train, task, recipe.batch_size)
    steps = SgdSteps(model, loader, recipe, CPU, steps=len(rates))
    steps.run(torch.Generator().manual_seed(1), rates)

    optimizer = torch.optim.AdamW(parameter_groups(literal, 0.1), fused=True)
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(1)
    passes = [loader.draws(generator)[:, :80].split(40, dim=1) for _ in range(2)]
    norms = []
    for rate, columns in zip(rates, [c for each in passes for c in each], strict=True):
        images, labels = loader.augmented(columns)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(rate)
        optimizer.zero_grad()
        F.cross_entropy(literal(images), labels).backward()
        if clip_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(ordered, clip_norm).item())
        optimizer.step()
    assert weights(model) == weights(literal)
    assert clip_norm is None or max(norms) > clip_norm  # some step was clipped


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """Through a checkpoint file, bit for bit, and every optimizer learns."""
    lr = {"Adadelta": 1.0, "ASGD": 0.1, "Adafactor": 0.05}.get(name, 0.01)
    recipe = Recipe(epochs=3, batch_size=32, optimizer=name, lr=lr, weight_decay=0.0)
    whole = convnet(dropout=0.2)
    curve = fit(whole, few(), recipe, seed=1)
    assert curve[-1].loss < curve[0].loss  # type: ignore[operator]
    run = Trainer(convnet(dropout=0.2), few(), recipe, seed=1)
    run.run_epoch()
    write_checkpoint(tmp_path / "a.ckpt", {}, run.state())
    model = convnet(seed=99, dropout=0.2)
    resumed = Trainer(model, few(), recipe, seed=1)
    resumed.restore(read_checkpoint(tmp_path / "a.ckpt", {}, CPU), run.curve)
    finish(resumed)
    assert untimed(resumed.curve) == untimed(curve)
    assert weights(model) == weights(whole)


def test_arguments_reach_the_optimizer() -> None:
    """Of a mapping; lists are tuples, as torch's own arguments."""
    given = {"name": "Adam", "betas": [0.5, 0.6], "amsgrad": True}
    run = Trainer(convnet(), few(), replace(ADAMW, optimizer=given), seed=0)
    group = run._sgd.optimizer.param_groups[0]
    assert type(run._sgd.optimizer) is torch.optim.Adam
    assert (group["betas"], group["amsgrad"], group["fused"]) == ((0.5, 0.6), True, True)


def test_a_wide_limit_clips_nothing_and_a_tight_one_bounds_the_step() -> None:
    """With plain SGD a step is lr times the gradient, whose norm is at most the limit."""
    plain = Recipe(epochs=1, batch_size=64, momentum=0, nesterov=False, weight_decay=0, lr=0.1)
    free, wide, tight = convnet(), convnet(), convnet()
    fit(free, few(), plain, seed=0)
    fit(wide, few(), replace(plain, clip_norm=1e6), seed=0)
    assert weights(wide) == weights(free)
    before = [p.detach().clone() for p in tight.parameters()]
    recipe = replace(plain, clip_norm=0.01, schedule="constant", warmup_epochs=0.0)
    task = few()
    loader = DeviceLoader(task.train, task, recipe.batch_size)
    SgdSteps(tight, loader, recipe, CPU, steps=1).run(torch.Generator().manual_seed(0), [0.1])
    moved = torch.cat([(p - q).flatten() for p, q in zip(tight.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-4)


def test_defaults_follow_the_optimizer() -> None:
    """Of SGD as always; of AdamW torch's own; others need a learning rate."""
    assert Recipe() == Recipe(optimizer="sgd", lr=0.1, momentum=0.9, nesterov=True)
    assert Recipe().weight_decay == 5e-4
    assert (Recipe(optimizer="AdamW").lr, Recipe(optimizer="AdamW").weight_decay) == (1e-3, 0.01)
    assert Recipe(optimizer="RMSprop", lr=0.1).weight_decay == 0
    for optimizer in ("sgd", "adamw", {"name": "Adam", "eps": 1e-6}):
        recipe = Recipe(optimizer=optimizer, lr=0.01)
        assert Recipe(**recipe_values(recipe)) == recipe
        config = StudyConfig(name="mine", trials=1, recipe=recipe)
        assert StudyConfig(**config.to_json()).recipe == recipe


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"optimizer": "adamv"},
            "recipe: lr must be given with the optimizer 'adamv'; only sgd and adamw have a "
            "default",
        ),
        (
            {"optimizer": {"eps": 1e-6}},
            "recipe: optimizer must be a name, or have one, such as {name: RMSprop, alpha: 0.9}, "
            "but was {'eps': 1e-06}",
        ),
        (
            {"optimizer": "adamw", "momentum": 0.9},
            "recipe: momentum is for the optimizer sgd, but was 0.9 with 'adamw': leave it out, or "
            "write it among the optimizer's arguments",
        ),
        ({"clip_norm": 0}, "recipe.clip_norm must be greater than 0, but was 0"),
        (
            {"optimizer": 3},
            "recipe.optimizer must be text or a mapping of keys to values, but was 3",
        ),
    ],
)
def test_recipes_that_break_a_rule(keys: dict[str, Any], message: str) -> None:
    """One line each, when the recipe is made."""
    with pytest.raises(StudyError) as caught:
        Recipe(**keys)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            "adamv",
            r"recipe\.optimizer must be sgd, adamw or a class of torch\.optim, but was 'adamv'; "
            "did you mean 'adam'\\?",
        ),
        (
            {"name": "RMSprop", "alhpa": 0.9},
            r"unknown key 'recipe\.optimizer\.alhpa'; did you mean 'alpha'\?",
        ),
        ({"name": "Adam", "fused": True}, r"unknown key 'recipe\.optimizer\.fused'; known are "),
        (
            {"name": "Adam", "lr": 1.0},
            r"lr is a key of the recipe, but recipe\.optimizer has lr=1\.0: write it beside "
            "`optimizer`",
        ),
        ({"name": "SGD", "momentum": 0.5}, r"momentum is a key of the recipe, but recipe\.opt"),
        ({"name": "RMSprop", "alpha": -1}, r"RMSprop does not with .*: Invalid alpha value: -1"),
        ("LBFGS", "torch's LBFGS does not with 'LBFGS': LBFGS doesn't support"),
        ("SparseAdam", "torch's SparseAdam does not with 'SparseAdam': .*dense gradients"),
    ],
)
def test_optimizers_that_cannot_train(optimizer: Any, message: str, tmp_path: Path) -> None:
    """A study refuses them in one line, before it makes a storage."""
    with pytest.raises(StudyError, match=message) as caught:
        check_optimizer(Recipe(optimizer=optimizer, lr=0.1))
    assert "\n" not in str(caught.value)
    recipe = Recipe(epochs=1, batch_size=2, optimizer=optimizer, lr=0.1)
    study = Study(tiny.config(recipe=recipe), tiny.space(), tiny.task(), folder=tmp_path / "a")
    with pytest.raises(StudyError, match=message), study.search():
        pass
    assert not (tmp_path / "a").exists()


def test_weight_decay_that_an_optimizer_has_not() -> None:
    """Rprop has none, so that the key would do nothing."""
    with pytest.raises(StudyError, match="torch's Rprop has no weight decay"):
        check_optimizer(Recipe(optimizer="rprop", lr=0.1, weight_decay=0.1))


def test_recipes_of_methods_are_checked_too(tmp_path: Path) -> None:
    """A method that fails after hours of other trials would be found late."""
    method = {"method": "fisher", "pretrain": {"optimizer": "adamv", "lr": 0.1}}
    study = Study(tiny.config(proposers=[method]), tiny.space(), tiny.task(), folder=tmp_path)
    message = r"proposers\.0\.pretrain\.optimizer must be sgd, adamw"
    with pytest.raises(StudyError, match=message), study.search():
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
def test_a_graph_gives_the_numbers_of_eager_steps(name: str) -> None:
    """Of capturable optimizers; others run eagerly and say so."""
    recipe = Recipe(epochs=3, batch_size=32, optimizer=name, lr=0.01, weight_decay=0.0)
    captured, plain = convnet(), convnet()
    run = Trainer(captured, few(), recipe, seed=0, device="cuda")
    finish(run)
    curve = fit(plain, few(), replace(recipe, capture=False), seed=0, device="cuda")
    assert untimed(run.curve)[-1][:3] == untimed(curve)[-1][:3]
    if name in ("Adagrad", "Adafactor"):
        assert run.mode.endswith(f"eager (torch's {name} cannot be captured)")
    else:
        assert run.mode.endswith("graph")
