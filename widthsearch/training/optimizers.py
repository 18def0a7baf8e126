"""The optimizer of a recipe: a class of ``torch.optim``, checked before anything is trained.

Notation::

    rate     the learning rate of the present step: a tensor on the device, or a number
    fused    one kernel updates all parameters
    graph    steps can be repeated as a CUDA graph, see ``training/cuda_graphs.py``

A CUDA graph holds no line of Python, so the rate and all state of its optimizer must be tensors of
the device. torch calls an optimizer with such state *capturable*. One that is not is given its rate
as a number before each step, and runs eagerly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.errors import StudyError, first_line
from widthsearch.training.recipe import Recipe
from widthsearch.utils.validation import boolean_as_number, hint

_CLASSES: Mapping[str, type[torch.optim.Optimizer]] = {
    name.lower(): each
    for name, each in vars(torch.optim).items()
    if isinstance(each, type)
    and issubclass(each, torch.optim.Optimizer)
    and each is not torch.optim.Optimizer
}

_OF_RECIPE = ("lr", "weight_decay")
"""Arguments that are keys of the recipe itself; of SGD also momentum and nesterov."""

_OF_TRAINER = ("params", "fused", "foreach", "capturable", "differentiable", "maximize")
"""Arguments that decide how a step is executed, or turn it round."""

_RATE_IS_TENSOR = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Their fused kernels read the rate from a tensor."""


def make_optimizer(
    groups: Iterable[Mapping[str, Any]], recipe: Recipe, rate: Tensor
) -> torch.optim.Optimizer:
    """The optimizer of a recipe, in torch's fastest form that is correct on the device.

    Before each step, fill ``rate`` where :func:`has_tensor_rate`, and else set ``lr`` of each
    group. With ``clip_norm`` all gradients together are clipped at the beginning of each step.

    Args:
        groups: Parameters in groups, each with its weight decay.
        recipe: The optimizer with its arguments, weight decay and clipping.
        rate: The learning rate, (), on the device of the parameters.

    Raises:
        StudyError: The recipe's optimizer does not exist or does not take its arguments.

    Example:
        >>> net, recipe = nn.Linear(4, 2), Recipe(optimizer={"name": "AdamW", "eps": 1e-6})
        >>> optimizer = make_optimizer([{"params": net.parameters()}], recipe, torch.tensor(0.1))
        >>> type(optimizer).__name__, optimizer.defaults["eps"], optimizer.defaults["fused"]
        ('AdamW', 1e-06, True)
    """
    chosen, arguments = _chosen(recipe)
    known, cuda = inspect.signature(chosen).parameters, rate.is_cuda
    if "fused" in known and not (cuda and chosen is torch.optim.Adagrad):  # fused on a CPU only
        arguments["fused"] = True
    if "capturable" in known and cuda:
        arguments["capturable"] = True
    if "weight_decay" in known:
        arguments["weight_decay"] = recipe.weight_decay
    as_tensor = "capturable" in arguments or chosen in _RATE_IS_TENSOR
    made: Any = chosen  # torch's stubs know the base class's arguments alone
    optimizer: torch.optim.Optimizer = made(
        [dict(group) for group in groups], lr=rate if as_tensor else float(rate), **arguments
    )
    if recipe.clip_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = recipe.clip_norm

        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_(parameters, limit)

        optimizer.register_step_pre_hook(clip)
    return optimizer


def has_tensor_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer reads its learning rate from a tensor."""
    return isinstance(optimizer.defaults["lr"], Tensor)


def why_no_graph(optimizer: torch.optim.Optimizer) -> str | None:
    """Why steps of the optimizer cannot be repeated as a CUDA graph; None where they can."""
    if has_tensor_rate(optimizer):
        return None
    return f"torch's {type(optimizer).__name__} cannot be captured"


def check_optimizer(recipe: Recipe, place: str = "recipe") -> None:
    """Check a recipe's optimizer by one step of a small network.

    Args:
        recipe: The recipe.
        place: The place of the recipe in the configuration, for messages.

    Raises:
        StudyError: There is no such optimizer, it does not take an argument, or it cannot train a
            network: for example LBFGS, which needs the loss as a function.

    Example:
        >>> check_optimizer(Recipe(optimizer={"name": "RMSprop", "alpha": 0.9}, lr=1e-3))
        >>> check_optimizer(Recipe(optimizer={"name": "RMSprop", "alhpa": 0.9}, lr=1e-3))
        Traceback (most recent call last):
        widthsearch.errors.StudyError: unknown key 'recipe.optimizer.alhpa'; did you mean 'alpha'?
    """
    chosen, _ = _chosen(recipe, place)
    small = nn.Linear(2, 2)
    groups = [{"params": [parameter]} for parameter in small.parameters()]
    for parameter in small.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        make_optimizer(groups, recipe, torch.tensor(recipe.lr)).step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise StudyError(
            f"{place}.optimizer must train any network by its gradients, but torch's "
            f"{chosen.__name__} does not with {recipe.optimizer!r}: {first_line(error)}"
        ) from error


def _chosen(
    recipe: Recipe, place: str = "recipe"
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class of the recipe's optimizer, and its arguments but those of the recipe itself."""
    name, own = recipe.optimizer_name, dict(recipe.optimizer_arguments)
    if name.lower() not in _CLASSES:
        raise StudyError(
            f"{place}.optimizer must be sgd, adamw or a class of torch.optim, but was {name!r}"
            f"{hint(name.lower(), _CLASSES)}"
        )
    chosen = _CLASSES[name.lower()]
    known = inspect.signature(chosen).parameters
    taken = (*_OF_RECIPE, "momentum", "nesterov") if recipe.is_sgd else _OF_RECIPE
    for key in own:
        if key in taken:
            raise StudyError(
                f"{key} is a key of the recipe, but {place}.optimizer has {key}={own[key]!r}: "
                "write it beside `optimizer`"
            )
        if key not in known or key in _OF_TRAINER:
            names = known.keys() - {*taken, *_OF_TRAINER}
            raise StudyError(f"unknown key '{place}.optimizer.{key}'{hint(key, names)}")
        default = known[key].default
        if fault := boolean_as_number(own[key], default, f"{place}.optimizer.{key}"):
            raise StudyError(fault)
    if recipe.weight_decay and "weight_decay" not in known:
        raise StudyError(
            f"torch's {chosen.__name__} has no weight decay, but {place}.weight_decay is "
            f"{recipe.weight_decay:g}: leave it out"
        )
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in own.items()}
    if recipe.is_sgd:
        arguments |= {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
    return chosen, arguments
