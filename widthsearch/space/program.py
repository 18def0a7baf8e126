"""A network as a program of ``torch.export``, which runs without the code of its class."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from widthsearch.errors import one_line
from widthsearch.space.computation import largest_difference, outputs, random_inputs
from widthsearch.torch_internals import tree_map
from widthsearch.utils.files import write_atomically

if TYPE_CHECKING:
    from widthsearch.space.search_space import SearchSpace

TOLERANCE = 1e-4
"""The largest difference between outputs of the program and of the network, as a share of the
largest element: torch.export decomposes no operator, but another kernel may be chosen."""


@dataclass(frozen=True)
class Program:
    """What became of the program of a network.

    Attributes:
        batch: The batch sizes that it takes: ``any``, or ``1``; None where there is no program.
        reason: Why it does not take any batch, or why there is none; empty for ``any``.

    Example:
        >>> Program("1", "the batch is used as a size").batch
        '1'
    """

    batch: str | None
    reason: str = ""


def write_program(space: SearchSpace, model: nn.Module, path: Path) -> Program:
    """Write a network's program, and check it against the network.

    ``torch.export.load(path).module()`` makes it run; it takes the inputs of the network, in eval
    mode and on the CPU. The batch is dynamic where the network exports so, else 1.

    Args:
        space: The space of the network.
        model: The network, in eval mode on the CPU.
        path: The file. Nothing is written, and a file that is there stays, where export fails.

    Returns:
        The batch sizes of the program, and the fault in one line.

    Example:
        >>> import tempfile
        >>> from widthsearch.space.search_space import SearchSpace
        >>> space = SearchSpace.from_model(
        ...     lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (4,)
        ... )
        >>> path = Path(tempfile.mkdtemp(), "model.pt2")
        >>> write_program(space, space.build(0.5).eval(), path)
        Program(batch='any', reason='')
        >>> torch.export.load(path).module()(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    reason = ""
    with _silent():
        for batch in ("any", "1"):
            sizes = (2, 1, 5) if batch == "any" else (1,)
            try:
                program = _exported(model, random_inputs(space, sizes[0], seed=0), batch == "any")
                write_atomically(path, partial(torch.export.save, program))
                try:
                    _check(space, model, torch.export.load(path).module(), sizes)
                except BaseException:
                    path.unlink()
                    raise
            except Exception as error:  # noqa: BLE001  of any kind, and then there is no program
                reason = reason or one_line(error).partition(" For more information")[0]
            else:
                return Program(batch, reason)
    return Program(None, reason)


def _exported(model: nn.Module, x: Any, dynamic: bool) -> Any:
    """The program of a model for the shapes of a batch, or for batches of any size."""
    args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
    dims: Any = {0: torch.export.Dim("batch", min=1)} if dynamic else {}
    shapes = tree_map(lambda _: dims, kwargs or args)
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def _check(
    space: SearchSpace, model: nn.Module, program: nn.Module, sizes: tuple[int, ...]
) -> None:
    """Compare a program with its network on random inputs of some batch sizes.

    Raises:
        ValueError: The outputs differ.
    """
    for size in sizes:
        x = random_inputs(space, size, seed=size)
        with torch.no_grad():
            found = outputs(program, x)
        worst = largest_difference(found, outputs(model, x))
        if not worst <= TOLERANCE:
            raise ValueError(f"its outputs are {worst:.1g} off the network's for a batch of {size}")


@contextmanager
def _silent() -> Iterator[None]:
    """Without the log of torch.export, which repeats each error over many lines, and its warnings.

    It warns of a recurrent layer's list of weights, which it takes for tensors that a pass assigns.
    What a program computes is compared, whatever it warns of.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
