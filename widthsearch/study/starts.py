"""Weights that trainings start from: new ones, or those of a trained base, cut to their widths.

A network of narrower widths keeps the most important channels of each axis, with their weights and
statistics; it is the network that ``scratch`` would train, with other values in its tensors. Of
wider axes all channels of the base are kept, and the further ones are new.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from widthsearch.channels.dependency_graph import DependencyGraph, build_dependency_graph
from widthsearch.channels.extraction import extract, kept_positions
from widthsearch.channels.sums import gate_gradients
from widthsearch.data.loaders import samples
from widthsearch.data.tasks import AnyTask, Task
from widthsearch.errors import StudyError
from widthsearch.modules.tree import join, tensors_of
from widthsearch.proposers.fisher import FisherInformation
from widthsearch.proposers.magnitude import filter_norms
from widthsearch.proposers.slimming import norm_scales
from widthsearch.proposers.tuning import load_weights
from widthsearch.space.search_space import SearchSpace
from widthsearch.study.config import StudyConfig
from widthsearch.study.job import own_task
from widthsearch.study.sections import DATA_IMPORTANCES, Importance
from widthsearch.widths import Widths

_logger = logging.getLogger(__name__)

_BATCHES = 4
"""Batches of the training split that an importance reads."""


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """The weights of a trained base network, with the importance of its channels.

    Attributes:
        state: Its ``state_dict``, on the CPU.
        scores: Per axis of the unconstrained space, the importance of each group, (groups,).
        digest: Identifies weights and importances.
        epochs: The epochs of its training; None where they are unknown.

    Example:
        >>> space = SearchSpace.from_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (4,))
        >>> base = space.build(space.base, seed=0)
        >>> weights = BaseWeights.of(space, base.state_dict(), "magnitude")
        >>> narrow = Extraction(space, weights).network(space.widths([6]), seed=1)
        >>> narrow[0].weight.shape
        torch.Size([6, 4])
        >>> all((row == base[0].weight).all(1).any() for row in narrow[0].weight)
        True
    """

    state: Mapping[str, Tensor]
    scores: Sequence[NDArray[np.float64]]
    digest: str
    epochs: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What a storage keeps of them."""
        return {"digest": self.digest, "epochs": self.epochs}

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        state: Mapping[str, Tensor],
        importance: Importance,
        task: AnyTask | None = None,
        epochs: float | None = None,
    ) -> BaseWeights:
        """Compute the importance of the channels of a base network.

        Args:
            space: The space.
            state: The ``state_dict`` of a network at the base widths.
            importance: What channels are kept by.
            task: The data, for ``sensitivity`` and ``fisher``.
            epochs: The epochs of its training.

        Raises:
            StudyError: An axis cannot be cut.
        """
        base, graph = _base(space, state)
        _check_axes(space, graph)
        scores = [s.double().cpu().numpy() for s in _importances(importance, graph, base, task)]
        content = hashlib.sha256()
        for name, tensor in sorted(state.items()):
            content.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        for of_axis in scores:
            content.update(np.argsort(-of_axis, kind="stable").tobytes())
        return cls(dict(base.state_dict()), scores, content.hexdigest()[:16], epochs)


class Extraction:
    """Makes networks of a space that start from the weights of its base.

    Args:
        space: The space.
        weights: The weights.

    Example:
        >>> space = SearchSpace.from_model(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (4,))
        >>> weights = BaseWeights.of(space, space.build([8], seed=0).state_dict(), "magnitude")
        >>> wide = Extraction(space, weights).network(space.widths([12]), seed=1)
        >>> torch.equal(wide[0].weight[:8], weights.state["0.weight"])
        True
    """

    def __init__(self, space: SearchSpace, weights: BaseWeights) -> None:
        self._space, self._scores = space, weights.scores
        self._base, self._graph = _base(space, weights.state)

    def network(self, widths: Widths, seed: int) -> nn.Module:
        """A network in training mode, at any widths.

        Args:
            widths: The widths.
            seed: Seeds the initialisation of channels that the base has not.
        """
        plain, graph = self._space.unconstrained, self._graph
        wanted = self._space.to_unconstrained(widths)
        keep: dict[str, list[int]] = {}
        for axis, scores in zip(plain.trace.axes, self._scores, strict=True):
            if wanted[axis.name] < graph.widths[axis.name]:
                best = np.argsort(-scores, kind="stable")[: wanted[axis.name] // axis.divisor]
                mine = np.isin(graph.group[axis.maker], best)
                keep[axis.name] = np.flatnonzero(mine).tolist()
        cut = extract(plain.model, self._base, keep, graph) if keep else self._base
        network = self._space.build(widths, seed=seed)
        values = {join(layer, name): tensor for _, layer, name, tensor in tensors_of(cut)}
        persistent = network.state_dict().keys()
        places = _Places(plain, wanted, graph.widths)
        with torch.no_grad():
            for _, layer, name, tensor in tensors_of(network):
                if (key := join(layer, name)) in persistent:
                    place = places.of(key, tensor)
                    tensor.data[place] = values[key].detach().to(tensor)
        return network


class _Places:
    """Where the base's channels are in the tensors of a network that may be wider."""

    def __init__(self, plain: SearchSpace, wanted: Widths, base: Widths) -> None:
        self._graph: DependencyGraph | None = None
        if any(wanted[name] > base[name] for name in base):
            self._graph = build_dependency_graph(plain.model, wanted)
            self._kept = [
                np.arange(groups) < base[axis.name] // axis.divisor
                for groups, axis in zip(self._graph.groups, plain.trace.axes, strict=True)
            ]

    def of(self, key: str, tensor: Tensor) -> Any:
        """An index of a tensor: everything, or the open mesh of positions along each dim."""
        if self._graph is None or not tensor.dim():
            return ...
        indices = []
        for dim, size in enumerate(tensor.shape):
            at = np.arange(size)
            if (key, dim) in self._graph.axis:
                at = np.flatnonzero(kept_positions(self._graph, self._kept, (key, dim)))
            indices.append(torch.from_numpy(at))
        return torch.meshgrid(*indices, indexing="ij")


def start_network(
    space: SearchSpace, widths: Widths, weights: BaseWeights | None, seed: int
) -> nn.Module:
    """A network as its training starts.

    Args:
        space: Its space.
        widths: Its widths.
        weights: The weights of the base that its own are cut from; None for new ones.
        seed: Seeds the initialisation.
    """
    if weights is None:
        return space.build(widths, seed=seed)
    return Extraction(space, weights).network(widths, seed)


def load_start(
    config: StudyConfig, spaces: Mapping[str, SearchSpace], load_task: Callable[[], Task]
) -> BaseWeights | None:
    """The base weights of a study, with the importance of their channels.

    Args:
        config: The study's configuration.
        spaces: Its spaces by name.
        load_task: Returns the task of the built-in trainer; called where its data is read.

    Returns:
        None where all trainings start from scratch.

    Raises:
        StudyError: The weights cannot be read or used.
    """
    if config.weights is None:
        return None
    if len(spaces) > 1:
        raise StudyError(
            "`start: extract` cuts the weights of one base, but the study has the spaces "
            f"{', '.join(spaces)}: make a study of each"
        )
    (space,) = spaces.values()
    task: AnyTask | None = None
    if config.importance in DATA_IMPORTANCES:
        task = own_task(config) if config.trainer is not None else load_task()
    if config.importance in DATA_IMPORTANCES and task is None:
        raise StudyError(
            f"importance {config.importance!r} reads data, but the study has a trainer of its own "
            "and no loss: add `loss` and `batches`, or use magnitude or slimming"
        )
    card = _card(Path(config.weights))
    plain, epochs = space.unconstrained, _epochs(card)
    base = plain.build(plain.base, seed=0)
    load_weights(base, config.weights, f"{_training(card, 0)}; 0 is the ID of the base")
    if card.get("split") == "test":
        _check_unseen(config, card, load_task)
    if epochs is None and "scratch_b" in config.start:
        raise StudyError(
            "`scratch_b` needs the epochs of the base's training, but "
            f"{config.weights!r} has no card with them: give a folder of `widthsearch train "
            "--search-data`, or leave scratch_b out"
        )
    return BaseWeights.of(space, base.state_dict(), config.importance, task, epochs)


def _card(path: Path) -> dict[str, Any]:
    """The card of weights of ``widthsearch train``, its folder or file; empty if there is none."""
    folder = path.parent if path.name == "weights.pt" else path
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / "card.json").read_text("utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _epochs(card: Mapping[str, Any]) -> float | None:
    """The epochs of the training of a card; None where unknown."""
    with suppress(ValueError, KeyError, TypeError):
        return float(card["recipe"]["epochs"])
    return None


def _check_unseen(
    config: StudyConfig, card: Mapping[str, Any], load_task: Callable[[], Task]
) -> None:
    """Check that a final training was of another task; warn where an own trainer hides it.

    That of the built-in trainer is on the validation split too, so that networks which are cut from
    it would be compared on images that their weights have seen.

    Raises:
        StudyError: It was of this task.
    """
    way = _training(card, card.get("trial"))
    if config.trainer is not None or card.get("trainer") is not None:
        _logger.warning(
            "the weights of %r are of a final training; if its data has the validation split, on "
            "which networks are compared, %s",
            config.weights,
            way,
        )
        return
    if config.task is not None and config.task.name != card.get("task"):
        return
    task = load_task()
    if (card.get("task"), card.get("classes")) == (task.name, list(task.names) or None):
        raise StudyError(
            f"the weights of {config.weights!r} have seen the validation split of task "
            f"{task.name!r}, on which networks are compared: {way}"
        )


def _training(card: Mapping[str, Any], trial: object) -> str:
    """How to train the base by the study of a card, or by any, on the data of the search."""
    return (
        f"train the base by `widthsearch train {card.get('study', 'STUDY')} --pick {trial} "
        "--search-data --out FOLDER`, and name that folder"
    )


def scratch_epochs(epochs: int, of_base: float, base_macs: int, macs: int) -> int:
    """The epochs of a training from scratch that computes as much as base and cut together.

    With E epochs of a network of M MACs per sample, and E_b epochs of a base of M_b MACs, they are
    E + E_b M_b / M: Scratch-B of Liu et al. 2019, arXiv 1810.05270, with the base's training.

    Example:
        >>> scratch_epochs(10, of_base=20, base_macs=4000, macs=1000)
        90
    """
    return round(epochs + of_base * base_macs / macs)


def _base(space: SearchSpace, state: Mapping[str, Tensor]) -> tuple[nn.Module, DependencyGraph]:
    """The base network with its weights, in eval mode, and its dependency graph."""
    plain = space.unconstrained
    base = plain.build(plain.base, seed=0).eval()
    base.load_state_dict(state)
    return base, build_dependency_graph(plain.model, plain.base)


def _check_axes(space: SearchSpace, graph: DependencyGraph) -> None:
    """Check that every axis that is not pinned has channels that can be told apart.

    Raises:
        StudyError: Some axis has not.
    """
    ends = [
        space.to_unconstrained(Widths(space.names, tuple(getattr(a, end) for a in space.axes)))
        for end in ("min_width", "max_width")
    ]
    for i, reason in graph.unknown.items():
        name = graph.widths.names[i]
        if any(each[name] != graph.widths[name] for each in ends):
            raise StudyError(
                f"`start: extract` needs channels that can be removed one by one, but those of "
                f"axis {name!r} cannot, since {reason}: pin it, `constraints: {{pin: [{name}]}}`, "
                "or start from scratch"
            )


def _importances(
    importance: Importance, graph: DependencyGraph, base: nn.Module, task: AnyTask | None
) -> list[Tensor]:
    """Per axis, the importance of each group; where it is not defined, the norm of the filters."""
    assert importance in get_args(Importance)
    norms = [each.detach() for each in filter_norms(graph, base, "l1")]
    if importance == "magnitude":
        return norms
    if importance == "slimming":
        return norm_scales(graph, base)
    assert task is not None
    if importance == "sensitivity":
        found = [torch.zeros(n) for n in graph.groups]
        for batch in _batches(task):
            gradients = gate_gradients(graph, base, lambda b=batch: task.loss(base, b))  # type: ignore[misc]
            found = [a + b for a, b in zip(found, gradients, strict=True)]
        return [each.abs() for each in found]
    information = FisherInformation(graph, base)
    with information:
        for batch in _batches(task):
            torch.autograd.backward(task.loss(base, batch))
            information.gather(samples(batch))
    deltas = information.deltas()
    return [d if d.isfinite().all() else n for d, n in zip(deltas, norms, strict=True)]


def _batches(task: AnyTask) -> Iterator[Any]:
    return islice(iter(task.batches("train", 0)), _BATCHES)
