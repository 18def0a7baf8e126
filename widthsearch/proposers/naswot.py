"""NASWOT: a score of untrained networks, hill-climbed within each budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from widthsearch.data.loaders import samples
from widthsearch.data.tasks import AnyTask
from widthsearch.errors import StudyError
from widthsearch.proposers.families import LinearFamily
from widthsearch.proposers.protocol import Count, Proposal, Setting
from widthsearch.proposers.sensitivity import class_balanced_batches
from widthsearch.space.search_space import SearchSpace
from widthsearch.utils.devices import check_device, deterministic_cudnn, seeded
from widthsearch.utils.validation import validated_dataclass
from widthsearch.widths import Widths

Vector = NDArray[np.int64]

ACTIVATIONS = frozenset(
    {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "elu", "elu_", "celu", "selu"}
    | {"gelu", "silu", "mish", "hardswish", "hardtanh", "softplus", "tanh"}
)
"""Functions of torch whose input's sign is a unit's binary code."""


@validated_dataclass("naswot")
class Naswot:
    """Neural architecture search without training (Mellor et al. 2021, arXiv 2006.04647).

    The score of an untrained network is ``log det K`` with ``K_ij = A - d_ij`` for two images of a
    batch: A is the number of its activation units, and d the number of those that are on for one
    of the images and off for the other. A network that tells the images apart has a high score.

    For each of some sizes, from the base down, the widths of the last size are scaled to the next
    budget and changed by hill climbing: some steps from one axis to another, within the budget and
    the widths of the last size, kept where the score rises.

    Deviations: the paper samples cells of a search space at random; the sign of an activation's
    input is the code, also of smooth activations; batch norm is in training mode.

    Attributes:
        batch_size: Images, at least one per class; default 64. The batch of a user's own task has
            its own size.
        candidates: Networks that are scored for each size; default 60.
        members: The number of sizes, evenly spaced in log MACs; default 8.

    Example:
        >>> from widthsearch.data.tasks import load_task
        >>> net = nn.Sequential(
        ...     nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        ...     nn.Linear(128, 10),
        ... )
        >>> space = SearchSpace.from_model(net, (1, 8, 8))
        >>> method = Naswot(candidates=8, members=2)
        >>> base, small = method(space, load_task("digits"), Setting(lowest=0.3)).trajectory
        >>> base.vector, space.cost(small).macs <= 0.3 * space.cost(base).macs
        ((8, 8), True)
    """

    batch_size: Count = 64
    candidates: Count = 60
    members: Count = 8
    trains: ClassVar[bool] = False

    def __call__(self, space: SearchSpace, task: AnyTask, setting: Setting) -> Proposal:
        """Climb at each size; the provenance has the first and the best score of each.

        Raises:
            StudyError: The network has no activations, or the task no batch.
        """
        device = check_device(setting.device)
        batch = next(class_balanced_batches(task, self.batch_size, 1, setting.seed, device))

        def score(vector: Vector) -> float:
            widths = Widths(space.names, tuple(vector.tolist()))
            model = space.build(widths, seed=setting.seed).to(device)
            with seeded(setting.seed, 0, device), deterministic_cudnn():
                return activation_score(model, task, batch)

        rng = np.random.default_rng(setting.seed)
        base, narrowest = space.macs([space.base.vector, [a.min_width for a in space.axes]])
        lowest = max(setting.lowest * base, narrowest)
        path, scores = [np.array(space.base.vector, np.int64)], list[list[float]]()
        for budget in np.geomspace(base, lowest, max(2, self.members))[1:]:
            last = Widths(space.names, tuple(path[-1].tolist()))
            scaled = np.array(LinearFamily(space, last).solve(budget).vector)
            # The last size may lie below this budget already, a step of one axis being large.
            start = np.minimum(scaled, path[-1])
            found, first, best = climb(space, start, path[-1], budget, score, self.candidates, rng)
            path.append(found)
            scores.append([first, best])
            setting.report(
                f"{budget / base:.2f} of the base's MACs: score {first:.1f} to {best:.1f}"
            )
        trajectory = dict.fromkeys(Widths(space.names, tuple(v.tolist())) for v in path)
        provenance = {"seed": setting.seed, **asdict(self), "scores": scores}
        return Proposal("naswot", tuple(trajectory), provenance)


def climb(
    space: SearchSpace,
    start: Vector,
    most: Vector,
    budget: float,
    score: Callable[[Vector], float],
    candidates: int,
    rng: np.random.Generator,
) -> tuple[Vector, float, float]:
    """Hill climbing of a score within a budget of MACs.

    Args:
        space: The space.
        start: Widths within the budget.
        most: No axis becomes wider.
        budget: The MACs.
        score: The score of widths.
        candidates: The number of scores, that of the start among them.
        rng: Draws the moves.

    Returns:
        The best widths, the score of the start, and theirs.
    """
    first = best = score(start)
    widths, seen = start, {start.tobytes()}
    for _ in range(10 * candidates):  # most draws find a network that was not scored yet
        if len(seen) >= candidates:
            break
        moved = move(space, widths, most, budget, rng)
        if moved is None or moved.tobytes() in seen:
            continue
        seen.add(moved.tobytes())
        value = score(moved)
        if value > best:
            widths, best = moved, value
    return widths, first, best


def move(
    space: SearchSpace, widths: Vector, most: Vector, budget: float, rng: np.random.Generator
) -> Vector | None:
    """Narrow one axis by some steps and widen another as far as the budget allows.

    Returns:
        None if the draw leads to no other network within the budget.
    """
    steps = np.array([axis.step for axis in space.axes])
    least = np.array([axis.min_width for axis in space.axes])
    if len(steps) < 2:
        return None
    down, up = rng.choice(len(steps), 2, replace=False)
    moved = widths.copy()
    moved[down] = max(least[down], moved[down] - steps[down] * rng.geometric(0.5))
    while moved[up] + steps[up] <= most[up]:
        moved[up] += steps[up]
        if space.macs(moved) > budget:
            moved[up] -= steps[up]
            break
    return None if (moved == widths).all() or moved[down] == widths[down] else moved


def activation_score(model: nn.Module, task: AnyTask, batch: Any) -> float:
    """log det K of a network in training mode on a batch; -inf if two images have one code.

    Raises:
        StudyError: The network has no activations.
    """
    codes = _Codes(samples(batch))
    model.train()
    with torch.no_grad(), codes:
        task.loss(model, batch)
    if codes.kernel is None:
        raise StudyError(
            "naswot reads the signs of activations such as ReLU or GELU, but the network calls "
            "none of torch's; use `sensitivity`"
        )
    sign, logarithm = torch.linalg.slogdet(codes.kernel)
    return float(logarithm) if sign > 0 else -np.inf


class _Codes(TorchFunctionMode):
    """Adds up the kernel of binary codes over the activations of a forward pass.

    Attributes:
        kernel: A - d, (images, images) in float64; None before any activation.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self._images = images
        self.kernel: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if getattr(func, "__name__", "") in ACTIVATIONS and isinstance(x, Tensor):
            self._add(x)
        return func(*args, **kwargs)

    def _add(self, x: Tensor) -> None:
        if not x.dim() or len(x) % self._images:
            return  # its rows are not those of images
        code = (x > 0).view(self._images, -1).float()
        on = code.sum(1).double()
        # Units that agree are on in both images, code · code, or off in both: (1 - code)(1 - code).
        both = (code @ code.T).double()
        agree = 2 * both + code.shape[1] - on[:, None] - on
        self.kernel = agree if self.kernel is None else self.kernel + agree
