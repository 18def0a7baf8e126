"""A model and the widths it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from widthsearch.channels import extraction, masking
from widthsearch.errors import SpaceError
from widthsearch.modules.construction import Recorder, record
from widthsearch.space.constraints import Constraints, default_axis
from widthsearch.space.cost import Cost, QuadraticForm
from widthsearch.space.space_file import SpaceState, intact, read_space, write_space
from widthsearch.space.ties import constrained_widths, tied_scores, unconstrained_widths
from widthsearch.space.verification import CheckReport, check_space
from widthsearch.space.width_specs import (
    WidthBatch,
    WidthSpec,
    as_vectors,
    parse_widths,
    whole_groups,
)
from widthsearch.tracing.inputs import Inputs, as_inputs, sample
from widthsearch.tracing.leftovers import Leftover
from widthsearch.tracing.trace import Pinned, Trace
from widthsearch.tracing.traced_model import TracedModel
from widthsearch.widths import Axis, Widths, fingerprint, read_widths, write_widths

Model = nn.Module | Callable[[], nn.Module]
Names = str | Sequence[str]
Ties = str | Sequence[str | Sequence[str]]
Bound = float | Mapping[str, int | float]
Step = int | Mapping[str, int]


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """A model and, per axis, the widths it may take. Made by :meth:`from_model`.

    Attributes:
        name: The space's name in files and tables.
        axes: The free widths, in the order of every width vector.
        model: The traced model, with one axis per axis of the space.

    Example:
        >>> def net():
        ...     return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 6))
        >>> space = SearchSpace.from_model(net, (3, 8, 8))
        >>> space.axes[0].grid, space.cost([8])
        (range(2, 33, 2), Cost(macs=10656, params=3114, activations=298, weight_bytes=12456))
        >>> space.build([8], seed=0)[2]
        Conv2d(8, 10, kernel_size=(6, 6), stride=(1, 1))
    """

    name: str
    axes: tuple[Axis, ...]
    model: TracedModel
    _unconstrained: SearchSpace | None = field(default=None, repr=False)
    _stepped: frozenset[str] = field(default=frozenset(), repr=False)
    _forms: dict[str, QuadraticForm] = field(default_factory=dict, repr=False)

    @classmethod
    def from_model(
        cls,
        model: Model,
        input_shape: Inputs,
        *,
        name: str | None = None,
        min_width: Bound = 0.125,
        max_width: Bound = 2.0,
        step: Step | None = None,
        align: int | str | None = None,
        pin: Names = (),
        tie: Ties = (),
        init: Callable[[nn.Module], Any] | None = None,
    ) -> SearchSpace:
        """The space of all widths of a model.

        Args:
            model: A function without arguments that constructs the model, at any widths then; or
                a module, whose layers use their own ``reset_parameters`` (see :attr:`leftovers`).
            input_shape: One sample's shape, without the batch, e.g. ``(3, 32, 32)``; for other
                inputs see :data:`~widthsearch.tracing.inputs.Inputs`.
            name: The space's name; by default that of the function or the model's class.
            min_width: The smallest width of each axis, as a share of its base; or by axis. This
                and the next five: :class:`~widthsearch.space.constraints.Constraints`.
            max_width: The largest width, as a multiple of the base; or by axis.
            step: The distance of two widths, in channels; or by axis.
            align: ``cuda``, ``cpu`` or a number: steps in whole blocks of a device's kernels.
            pin: Axes that are fixed at their base, by name or glob (``layer3.*``).
            tie: Lists of axes that keep their bases' ratio; each becomes one axis.
            init: Called on each network that is built, after its constructor.

        Raises:
            TraceError: The model cannot be traced; the message names the module and the operation.
            SpaceError: It has no free width, or a constraint cannot be met.
        """
        constraints = Constraints(pin, tie, min_width, max_width, step, align)
        made, recorder, own_name = _constructed(model)
        shape, name = _checked_inputs(input_shape), name or own_name
        traced = TracedModel.of(made, shape, name, recorder, init)
        if not traced.trace.axes:
            raise _no_free_width(made, traced.trace.pinned)
        axes = tuple(default_axis(axis) for axis in traced.trace.axes)
        return cls(traced.name, axes, traced).with_constraints(constraints)

    def save(self, path: Path | str) -> None:
        """Write the trace and the axes as JSON; :meth:`load` needs no symbolic run."""
        spaces = [self] if self.unconstrained is self else [self.unconstrained, self]
        states = [SpaceState(space.trace, space.axes, space._stepped) for space in spaces]
        write_space(Path(path), self.name, self.input_shape, states)

    @classmethod
    def load(
        cls, path: Path | str, model: Model, *, init: Callable[[nn.Module], Any] | None = None
    ) -> SearchSpace:
        """The space in a file of :meth:`save`.

        Args:
            path: The file.
            model: The model of the space, as for :meth:`from_model`. The names and shapes of its
                tensors are compared with the file; its forward pass is not (see :meth:`check`).

        Raises:
            SpaceError: The file cannot be read, is damaged, has another format, or is of another
                model.
        """
        name, inputs, states = read_space(Path(path))
        made, recorder, _ = _constructed(model)
        with intact(Path(path)):
            for state in states:
                state.check(made, str(path))
            traced = TracedModel.of(made, inputs, name, recorder, init, states[0].trace)
            space = cls(name, states[0].axes, traced, None, states[0].stepped)
            for state in states[1:]:
                traced = replace(traced, trace=state.trace)
                space = cls(name, state.axes, traced, space, state.stepped)
            space.cost(space.base)
        return space

    def constrained(
        self,
        *,
        pin: Names = (),
        tie: Ties = (),
        min_width: Bound | None = None,
        max_width: Bound | None = None,
        step: Step | None = None,
        align: int | str | None = None,
    ) -> SearchSpace:
        """This space with further constraints: arguments and errors as in :meth:`from_model`."""
        return self.with_constraints(Constraints(pin, tie, min_width, max_width, step, align))

    def with_constraints(self, constraints: Constraints, block: int | None = None) -> SearchSpace:
        """The same by a value; ``block`` bounds the default steps, in channels."""
        stepped = self._stepped | constraints.stepped(self.trace, self.axes)
        trace, axes = constraints.apply(self.trace, self.axes, block, stepped)
        free = self._unconstrained if trace is self.trace else self.unconstrained
        # Not dataclasses.replace: it would copy the cost forms of this space's own axes.
        return SearchSpace(self.name, axes, replace(self.model, trace=trace), free, stepped)

    @property
    def unconstrained(self) -> SearchSpace:
        """The space before a user pinned or tied any axis; saliencies, masks and graphs use it."""
        return self if self._unconstrained is None else self._unconstrained

    def to_unconstrained(self, widths: Widths) -> Widths:
        """The same architecture as widths of :attr:`unconstrained` (perhaps off its grid)."""
        return unconstrained_widths(self.axes, self.unconstrained.axes, widths)

    def tie_scores(self, scores: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """Scores of the channels of each axis: see :func:`~widthsearch.space.ties.tied_scores`."""
        by_name = dict(zip(self.unconstrained.names, scores, strict=True))
        return tied_scores(self.axes, [a.divisor for a in self.trace.axes], by_name)

    @property
    def trace(self) -> Trace:
        """The result of the model's symbolic run."""
        return self.model.trace

    @property
    def input_shape(self) -> Any:
        """The shape of one sample, e.g. ``(3, 32, 32)``, or a tree of several inputs."""
        return self.model.input_shape

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The axes' names."""
        return tuple(axis.name for axis in self.axes)

    @cached_property
    def base(self) -> Widths:
        """The widths of the model as given."""
        return Widths(self.names, tuple(axis.base for axis in self.axes))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the space's name, its axes and its cost polynomials, but not of its grid."""
        trace = self.trace
        return fingerprint(self.name, self.axes, (trace.macs, trace.params, trace.activations))

    @property
    def pinned(self) -> tuple[Pinned, ...]:
        """The widths that are not free, each with its reason."""
        return self.trace.pinned

    @property
    def leftovers(self) -> tuple[Leftover, ...]:
        """Numbers and contents that networks of other widths keep from the base."""
        return self.model.leftovers

    def widths(self, spec: WidthSpec) -> Widths:
        """A width vector of this space.

        Args:
            spec: A multiplier of every base width, snapped to the grid; or widths by axis name
                (axes left out keep the base's); or one integer per axis. Integers must be on the
                grid, those of a :class:`Widths` whole groups: they may be older than its bounds.

        Raises:
            WidthsError: The message names the axis, the value, and the nearest allowed value.
        """
        own = isinstance(spec, Widths) and spec.names == self.names
        every = whole_groups(self.axes, self.trace.axes) if own else self.axes
        return parse_widths(self.name, every, spec)

    def widths_of(self, network: nn.Module | Mapping[str, torch.Tensor]) -> Widths:
        """The widths of a network of the same code, or of its state dict; perhaps off the grid.

        Raises:
            WidthsError: A tensor's shape is one that no widths give, or axes break a pin or a tie.
        """
        found = extraction.widths_of(self.unconstrained.model, network)
        return self.widths(constrained_widths(self.axes, self.unconstrained.axes, found))

    def nearest(self, vector: Sequence[float] | NDArray[Any]) -> Widths:
        """The width vector on the grid nearest to one real number per axis."""
        pairs = zip(self.axes, vector, strict=True)
        return Widths(self.names, tuple(axis.nearest(float(v)) for axis, v in pairs))

    def save_widths(self, path: Path | str, widths: WidthSpec) -> None:
        """Write :meth:`widths` of anything as JSON, with this space's name and fingerprint."""
        write_widths(Path(path), self.name, self.axes, self.fingerprint, self.widths(widths))

    def load_widths(self, path: Path | str, *, on_grid: bool = True) -> Widths:
        """The width vector in a file of :meth:`save_widths`, which may be edited by hand.

        Raises:
            WidthsError: It cannot be read, is of another space, or off the grid (``on_grid``).
        """
        every = whole_groups(self.axes, self.trace.axes)
        grid = self.axes if on_grid else ()
        return read_widths(Path(path), self.name, every, self.fingerprint, grid)

    def cost_form(self, quantity: str) -> QuadraticForm:
        """The quadratic form of one quantity of :class:`Cost`."""
        if quantity not in self._forms:
            divisors = [axis.divisor for axis in self.trace.axes]
            source = self.model if quantity == "weight_bytes" else self.trace
            poly = getattr(source, quantity)
            self._forms[quantity] = QuadraticForm.from_poly(poly, divisors)
        return self._forms[quantity]

    def macs(self, widths: WidthBatch) -> NDArray[np.int64]:
        """Multiply-accumulates of one sample's forward pass, for many width vectors at once.

        Args:
            widths: Whole numbers in channels, shape (N, axes) or (axes,); or :class:`Widths`, or a
                sequence of them. Off the grid, each width is rounded down to whole groups.

        Returns:
            int64, shape (N,) or (); half of the FLOPs that ``FlopCounterMode`` counts.

        Raises:
            WidthsError: They have another shape, or are not whole numbers from 0 on.
        """
        return self.cost_form("macs")(as_vectors(self.name, self.names, widths))

    def params(self, widths: WidthBatch) -> NDArray[np.int64]:
        """Number of parameters; arguments, shapes and errors as in :meth:`macs`."""
        return self.cost_form("params")(as_vectors(self.name, self.names, widths))

    def activations(self, widths: WidthBatch) -> NDArray[np.int64]:
        """Output elements of all convolutions and matrix products; the rest as in :meth:`macs`."""
        return self.cost_form("activations")(as_vectors(self.name, self.names, widths))

    def weight_bytes(self, widths: WidthBatch) -> NDArray[np.int64]:
        """Bytes of all parameters and buffers, by their dtypes; the rest as in :meth:`macs`."""
        return self.cost_form("weight_bytes")(as_vectors(self.name, self.names, widths))

    def cost(self, widths: WidthSpec) -> Cost:
        """The exact cost of one architecture."""
        vector = self.widths(widths).vector
        names = ("macs", "params", "activations", "weight_bytes")
        return Cost(*(int(self.cost_form(name)(vector)) for name in names))

    def build(
        self,
        widths: WidthSpec,
        *,
        seed: int | None = None,
        device: str | torch.device = "cpu",
        initialise: bool = True,
    ) -> nn.Module:
        """A new network of the model's own class at these widths, initialised, in training mode.

        Args:
            widths: Anything that :meth:`widths` takes.
            seed: Seeds the initialisation and restores the global random state afterwards; without
                it, values are drawn from the global random state.
            device: The device of its tensors.
            initialise: False leaves the values undefined, for weights that are loaded next.

        Raises:
            WidthsError: The widths do not fit the space.
        """
        vector = self.widths(widths).vector
        return self.model.build(vector, seed=seed, device=device, initialise=initialise)

    def extract(self, model: nn.Module, keep: Mapping[str, Iterable[int]]) -> nn.Module:
        """A network of the kept channels, on the grid: see ``channels/extraction.py``."""
        narrow = extraction.extract(self.model, model, keep)
        self.widths(extraction.widths_of(self.model, narrow).vector)
        return narrow

    def masked(
        self, model: nn.Module, keep: Mapping[str, Iterable[int]]
    ) -> AbstractContextManager[nn.Module]:
        """A context in which ``model`` has the kept channels only: see ``channels/masking.py``."""
        return masking.masked(self.model, model, keep)

    def check(
        self, *, seed: int = 0, vectors: int = 3, device: str | torch.device = "cpu"
    ) -> CheckReport:
        """Verify this space: see :func:`~widthsearch.space.verification.check_space`."""
        return check_space(self, seed=seed, vectors=vectors, device=device)


def _constructed(model: Model) -> tuple[nn.Module, Recorder | None, str]:
    """The module, the recorder of its constructor if ``model`` is a function, and a name."""
    if isinstance(model, nn.Module):
        return model, None, type(model).__name__
    if not callable(model):
        raise SpaceError(
            "a space is made from a torch.nn.Module, or a function without arguments that returns "
            f"one, but was given {model!r}"
        )
    made: Any
    made, recorder = record(model)
    if not isinstance(made, nn.Module):
        raise SpaceError(f"{model!r} must return a torch.nn.Module, but returned {made!r}")
    name = getattr(model, "__name__", "<lambda>")
    return made, recorder, type(made).__name__ if name == "<lambda>" else name


def _checked_inputs(input_shape: Inputs) -> Any:
    try:
        inputs = as_inputs(input_shape)
        sample(inputs, 1)
    except (TypeError, RuntimeError):  # RecursionError too: a text is a sequence of texts
        raise SpaceError(
            "an input must be the shape of one sample without the batch, e.g. (3, 224, 224), a "
            f"tensor, or a sequence or mapping of those, but was {input_shape!r}"
        ) from None
    return inputs


def _no_free_width(model: nn.Module, pinned: Sequence[Pinned]) -> SpaceError:
    by_reason: dict[str, list[str]] = {}
    for pin in pinned:
        by_reason.setdefault(pin.reason, []).append(f"{pin.name!r} ({pin.size})")
    widths = "; ".join(
        ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])]) + f": {reason}"
        for reason, names in by_reason.items()
    )
    return SpaceError(
        f"a model must have a free width, but all widths of {type(model).__name__} are fixed: "
        f"{widths or 'it has none'}; change the line that fixes one, or give another model"
    )
