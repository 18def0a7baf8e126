"""A model and the widths it may take."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from widthsearch.channels import extraction
from widthsearch.errors import SpaceError, WidthsError, first_line
from widthsearch.modules.initialisation import Recorder
from widthsearch.space.constraints import Constraints, default_step, on_grid
from widthsearch.space.cost import Cost, QuadraticForm
from widthsearch.space.verification import run_and_count
from widthsearch.tracing.inputs import Inputs, as_inputs, sample
from widthsearch.tracing.polynomials import Poly, evaluate
from widthsearch.tracing.trace import Pinned, Trace
from widthsearch.tracing.traced_model import TracedModel
from widthsearch.widths import Axis, Widths, fingerprint, read_widths, write_widths


@dataclass(frozen=True)
class CheckReport:
    """What :meth:`SearchSpace.check` built and ran, all of which cost what the space says.

    Attributes:
        networks: What each width vector is called, with the vector.
        device: Where they ran.
    """

    networks: Mapping[str, Widths]
    device: str

    def __str__(self) -> str:
        return (
            f"checked: {len(self.networks)} networks ({', '.join(self.networks)}) run forward and "
            f"backward on {self.device}; MACs, parameters and activations are what the space says"
        )


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """A model and, per axis, the widths it may take. Made by :meth:`from_model`.

    Attributes:
        name: What the space is called in files and tables.
        axes: The free widths, in the order of every width vector.
        model: The traced model, with one axis per axis of the space.
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
        model: nn.Module | Callable[[], nn.Module],
        input_shape: Inputs,
        *,
        name: str | None = None,
        min_width: float | Mapping[str, int | float] = 0.125,
        max_width: float | Mapping[str, int | float] = 2.0,
        step: int | Mapping[str, int] | None = None,
        align: int | str | None = None,
        pin: str | Sequence[str] = (),
        tie: str | Sequence[str | Sequence[str]] = (),
        init: Callable[[nn.Module], Any] | None = None,
    ) -> SearchSpace:
        """The space of all widths of a model.

        Args:
            model: A module, or a function without arguments that makes one. A function is better:
                its initialisation scheme is then recorded and applied at every width, while a
                given module's layers fall back on their own ``reset_parameters``.
            input_shape: One sample's shape, without the batch, e.g. ``(3, 32, 32)``; for models
                that take other things than one image, see
                :data:`~widthsearch.tracing.inputs.Inputs`.
            name: The space's name; by default the function's, or the class's of what a lambda
                makes.
            min_width: The smallest width of each axis, as a share of its base; or by axis, see
                :class:`~widthsearch.space.constraints.Constraints` (default: an eighth).
            max_width: The largest width of each axis, as a multiple of its base; or by axis (twice
                where nothing matches).
            step: The distance of two widths on each axis's grid, in channels, or that by axis; by
                default that of ``space.constraints.default_step``. One step for all, or for a glob,
                is lowered where the base would not be on the grid.
            align: ``cuda``, ``cpu`` or a number: steps in whole blocks of a device's kernels.
            pin: Axes that are fixed at their base, by name or glob (``layer3.*``).
            tie: Groups of axes that keep their bases' ratio; each becomes one axis.
            init: Called on each network that is built, after the recorded scheme.

        Raises:
            TraceError: The model cannot be traced; names the module and the operation.
            SpaceError: It has no free width, or a constraint cannot be met.
        """
        asked = Constraints(pin, tie, min_width, max_width, step, align)
        if not callable(model):
            raise SpaceError(
                "a space is made from a torch.nn.Module, or a function without arguments that "
                f"returns one, but was given {model!r}"
            )
        recorder = None if isinstance(model, nn.Module) else Recorder()
        made = model if isinstance(model, nn.Module) else recorder.construct(model)  # type: ignore[union-attr]
        if not isinstance(made, nn.Module):
            raise SpaceError(f"{model!r} must return a torch.nn.Module, but returned {made!r}")
        try:
            inputs = as_inputs(input_shape)
            sample(inputs, 1)
        except (TypeError, RuntimeError):  # also RecursionError: there is no end of texts in a text
            raise SpaceError(
                "an input must be the shape of one sample without the batch, e.g. (3, 224, 224), a "
                f"tensor, or a sequence or mapping of those, but was {input_shape!r}"
            ) from None
        called = getattr(model, "__name__", "<lambda>")
        called = type(made).__name__ if called == "<lambda>" else called
        traced = TracedModel.of(made, inputs, name or called, recorder, init)
        if not traced.trace.axes:
            raise SpaceError(
                f"{type(made).__name__} has no free width: each of its "
                f"{len(traced.trace.pinned)} widths is fixed by its input, its output or its code"
            )
        axes = []
        for axis in traced.trace.axes:
            whole = Axis(axis.name, axis.base, axis.divisor, axis.base, axis.divisor, axis.layers)
            s = default_step(axis.base, axis.divisor)
            axes.append(on_grid(whole, s, 0.125 * axis.base, 2 * axis.base))
        return cls(traced.name, tuple(axes), traced).with_constraints(asked)

    # -- constraints -------------------------------------------------------------------------

    def constrained(
        self,
        *,
        pin: str | Sequence[str] = (),
        tie: str | Sequence[str | Sequence[str]] = (),
        min_width: float | Mapping[str, int | float] | None = None,
        max_width: float | Mapping[str, int | float] | None = None,
        step: int | Mapping[str, int] | None = None,
        align: int | str | None = None,
    ) -> SearchSpace:
        """This space with less freedom; costs, shapes and networks stay exact.

        The arguments are those of :meth:`from_model`; what is not given stays as it is here.

        Raises:
            SpaceError: A name matches no axis, a bound excludes the base, or nothing is left.
        """
        return self.with_constraints(Constraints(pin, tie, min_width, max_width, step, align))

    def with_constraints(self, asked: Constraints, block: int | None = None) -> SearchSpace:
        """The same for constraints that are a value, such as a study's.

        Args:
            asked: The constraints.
            block: Channels in a block of the kernels of the device that the networks are for
                (:func:`~widthsearch.space.constraints.default_block`): the most that steps are by
                default, where neither the space nor ``asked`` says another step or ``align``.
        """
        stepped = self._stepped | asked.stepped(self.trace, self.axes)
        trace, axes = asked.apply(self.trace, self.axes, block, stepped)
        free = self._unconstrained if trace is self.trace else self.unconstrained
        # Not dataclasses.replace: what else is cached on this space is of its own axes.
        return SearchSpace(self.name, axes, replace(self.model, trace=trace), free, stepped)

    @property
    def trace(self) -> Trace:
        """The result of the model's symbolic run."""
        return self.model.trace

    @property
    def input_shape(self) -> Any:
        """The shape of one sample, e.g. ``(3, 32, 32)``, or a tree of several inputs."""
        return self.model.input_shape

    @property
    def unconstrained(self) -> SearchSpace:
        """The space before any axis was pinned or tied by a user: every axis is a width of its own.

        What looks at channels (saliency, masks) looks there: what is tied has its own channels.
        """
        return self if self._unconstrained is None else self._unconstrained

    def to_unconstrained(self, widths: Widths) -> Widths:
        """The same architecture as widths of :attr:`free` (perhaps off that space's grid)."""
        owners = {name: axis for axis in self.axes for name in (axis.name, *axis.tied)}
        vector = []
        for axis in self.unconstrained.axes:
            owner = owners.get(axis.name)
            width = axis.base if owner is None else widths[owner.name] * axis.base // owner.base
            vector.append(width)
        return Widths(self.unconstrained.names, tuple(vector))

    def tie_scores(self, scores: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """Scores of the channels of each axis of :attr:`free`, as scores of this space's channels.

        A unit of tied axes is so many channels of each: the lowest-scored go together, and each of
        the axis's own channels carries an equal part of their sum.

        Args:
            scores: Per axis of :attr:`free`, one score a channel of the base, shape (base,).

        Returns:
            Per axis of this space, shape (base,); untied axes' are as they were given.
        """
        index = {name: i for i, name in enumerate(self.unconstrained.names)}
        out = []
        for axis, traced in zip(self.axes, self.trace.axes, strict=True):
            own = scores[index[axis.name]]
            if axis.tied:
                units = axis.base // traced.divisor
                members = [np.sort(scores[index[name]]) for name in (axis.name, *axis.tied)]
                sums = np.sum([m.reshape(units, -1).sum(1) for m in members], axis=0)
                own = np.repeat(sums / traced.divisor, traced.divisor)
            out.append(own)
        return out

    # -- widths ------------------------------------------------------------------------------

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

    def widths(self, spec: float | Mapping[str, int] | Sequence[int]) -> Widths:
        """A width vector of this space.

        Args:
            spec: A multiplier of every base width, snapped to the grid; or widths by axis name
                (axes left out keep their base width); or one integer per axis. Integers must be
                on the grid.

        Raises:
            WidthsError: Names the axis, the value, and the nearest value that would do.
        """
        if isinstance(spec, bool) or spec is None:
            raise WidthsError(f"widths are a multiplier, a mapping or integers, not {spec!r}")
        if isinstance(spec, int | float | np.integer | np.floating):
            if not (math.isfinite(spec) and spec > 0):
                raise WidthsError(f"a width multiplier must be above 0, but is {spec!r}")
            return self.nearest([axis.base * float(spec) for axis in self.axes])
        if isinstance(spec, Mapping):
            unknown = [name for name in spec if name not in self.base]
            if unknown:
                close = difflib.get_close_matches(str(unknown[0]), self.names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"its axes are {self._listed()}"
                raise WidthsError(f"space {self.name!r} has no axis {unknown[0]!r}; {hint}")
            values: list[Any] = [spec.get(axis.name, axis.base) for axis in self.axes]
        else:
            values = list(spec)
            if len(values) != len(self.axes):
                raise WidthsError(
                    f"space {self.name!r} has {len(self.axes)} axes, but was given {len(values)} "
                    f"widths; its axes are {self._listed()}"
                )
        whole = [int(v) if isinstance(v, np.integer) else v for v in values]
        return Widths(self.names, tuple(a.check(v) for a, v in zip(self.axes, whole, strict=True)))

    def nearest(self, vector: Sequence[float] | NDArray[Any]) -> Widths:
        """The width vector on the grid nearest to one real number per axis."""
        return Widths(
            self.names, tuple(a.nearest(float(v)) for a, v in zip(self.axes, vector, strict=True))
        )

    def save_widths(
        self, path: Path | str, widths: Widths | float | Mapping[str, int] | Sequence[int]
    ) -> None:
        """Write a width vector as JSON, with this space's name and fingerprint.

        Args:
            path: The file; its folder must be there.
            widths: Anything that :meth:`widths` takes.

        Raises:
            WidthsError: The widths do not fit the space.
        """
        write_widths(Path(path), self.name, self.axes, self.fingerprint, self.widths(widths))

    def load_widths(self, path: Path | str) -> Widths:
        """The width vector in a file of :meth:`save_widths`, also where a person edited it.

        Raises:
            WidthsError: It cannot be read, is of another space (says what differs), or is not on
                the grid.
        """
        return read_widths(Path(path), self.name, self.axes, self.fingerprint)

    def _listed(self) -> str:
        shown = ", ".join(self.names[:8])
        return shown if len(self.names) <= 8 else f"{shown}, … ({len(self.names)} in all)"

    # -- cost --------------------------------------------------------------------------------

    def cost_form(self, quantity: str) -> QuadraticForm:
        """The quadratic form of ``macs``, ``params`` or ``activations``."""
        if quantity not in self._forms:
            poly: Poly = getattr(self.trace, quantity)
            units = [axis.divisor for axis in self.trace.axes]
            self._forms[quantity] = QuadraticForm.from_poly(poly, units)
        return self._forms[quantity]

    def macs(self, widths: Widths | Sequence[Widths] | ArrayLike) -> NDArray[np.int64]:
        """Multiply-accumulates of one sample's forward pass, for many width vectors at once.

        Args:
            widths: Whole numbers, shape (N, axes) or (axes,), in channels; or :class:`Widths`, or
                a sequence of them. They need not be on the grid: what they would cost is counted
                in whole units of each axis (groups, heads), rounded down.

        Returns:
            int64, shape (N,) or (). Twice this is what ``FlopCounterMode`` counts.

        Raises:
            WidthsError: They have another shape, or are not whole numbers from 0 on.
        """
        return self.cost_form("macs")(self._vectors(widths))

    def params(self, widths: Widths | Sequence[Widths] | ArrayLike) -> NDArray[np.int64]:
        """Number of parameters; arguments, shapes and errors as in :meth:`macs`."""
        return self.cost_form("params")(self._vectors(widths))

    def activations(self, widths: Widths | Sequence[Widths] | ArrayLike) -> NDArray[np.int64]:
        """Output elements of all convolutions and matrix products; the rest as in :meth:`macs`."""
        return self.cost_form("activations")(self._vectors(widths))

    def _vectors(self, widths: Widths | Sequence[Widths] | ArrayLike) -> NDArray[np.int64]:
        """Width vectors as integers, shape (N, axes) or (axes,)."""
        if isinstance(widths, Widths):
            vectors: Any = self._vector(widths)
        elif isinstance(widths, Sequence):
            vectors = [self._vector(w) if isinstance(w, Widths) else w for w in widths]
        else:
            vectors = widths
        try:
            array = np.asarray(vectors)
        except ValueError:
            raise WidthsError("width vectors must have one length, but have several") from None
        if array.shape == (0,):
            array = np.empty((0, len(self.axes)), np.int64)
        if array.ndim not in (1, 2) or array.shape[-1] != len(self.axes):
            raise WidthsError(
                f"the widths of space {self.name!r} have shape ({len(self.axes)},) or "
                f"(N, {len(self.axes)}), but were given with shape {array.shape}"
            )
        if array.dtype.kind == "f":
            broken = array[~np.isfinite(array) | (array != np.floor(array))]
            if broken.size:
                raise WidthsError(f"widths must be whole numbers, but one is {broken[0]}")
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu":
            raise WidthsError(f"widths must be whole numbers, but are of type {array.dtype}")
        if array.size and array.min() < 0:
            raise WidthsError(f"widths must not be negative, but one is {array.min()}")
        return array

    def _vector(self, widths: Widths) -> tuple[int, ...]:
        if widths.names != self.names:
            raise WidthsError(
                f"widths must be of the axes {self._listed()} of space {self.name!r}, but are of "
                f"{', '.join(widths.names[:8])}"
            )
        return widths.vector

    @cached_property
    def pinned_shares(self) -> tuple[float, ...]:
        """Per pinned width, the share of the base's MACs in the layers whose shape depends on it.

        Shares overlap, since a layer's cost depends on both its widths.
        """
        free = self.unconstrained
        total = int(free.macs(free.base))
        x = [axis.base // axis.divisor for axis in free.trace.axes]
        of_layer = {name: evaluate(poly, x) for name, poly in free.trace.layer_macs.items()}
        traced = [
            sum(of_layer.get(layer, 0) for layer in set(pin.layers)) / total if total else 0.0
            for pin in free.pinned
        ]
        shares = dict(zip(free.names, free.cost_form("macs").share(free.base.vector), strict=True))
        return (*traced, *(float(shares[p.name]) for p in self.pinned[len(free.pinned) :]))

    def cost(self, widths: Widths | float | Mapping[str, int] | Sequence[int]) -> Cost:
        """The exact cost of one architecture."""
        vector = self.widths(widths).vector
        return Cost(int(self.macs(vector)), int(self.params(vector)), int(self.activations(vector)))

    # -- networks ----------------------------------------------------------------------------

    def build(
        self,
        widths: Widths | float | Mapping[str, int] | Sequence[int],
        *,
        seed: int | None = None,
        device: str | torch.device = "cpu",
        initialise: bool = True,
    ) -> nn.Module:
        """A new network of the model's own class at these widths, newly initialised.

        Args:
            widths: Anything that :meth:`widths` takes.
            seed: Seeds the initialisation, and leaves the global random state as it was; without
                it, the global random state is drawn from.
            device: Where the tensors are made.
            initialise: False leaves the values undefined, for weights that are loaded next.

        Returns:
            A module in training mode; its weights are never cut from the base model's.

        Raises:
            WidthsError: The widths do not fit the space.
        """
        return self.model.build(
            self.widths(widths).vector, seed=seed, device=device, initialise=initialise
        )

    def extract(self, model: nn.Module, keep: Mapping[str, Iterable[int]]) -> nn.Module:
        """A narrower network with the weights of the channels that are kept.

        See :func:`widthsearch.channels.extraction.inherit`.

        Raises:
            WidthsError: The channels do not fit the axes, or their number is not on the grid.
        """
        narrow = extraction.extract(self.model, model, keep)
        self.widths(extraction.widths_of(self.model, narrow).vector)
        return narrow

    def masked(
        self, model: nn.Module, keep: Mapping[str, Iterable[int]]
    ) -> AbstractContextManager[nn.Module]:
        """While it lasts, ``model`` computes as if only the channels that are kept were there.

        See :func:`widthsearch.channels.extraction.masked`.
        """
        return extraction.masked(self.model, model, keep)

    # -- proof -------------------------------------------------------------------------------

    def check(
        self, *, seed: int = 0, vectors: int = 3, device: str | torch.device = "cpu"
    ) -> CheckReport:
        """Prove the space: build networks, run them, and compare torch's counts with the cost.

        The least, the most and random widths are built, run forward in eval mode, and forward and
        backward in training mode. MACs are compared with ``FlopCounterMode``, integer for integer,
        with attention's fused paths off, since they hide products from it.

        Args:
            seed: Of the random widths.
            vectors: How many random width vectors.
            device: Where the networks run; ``meta`` runs shapes without values, which takes no
                memory and little time.

        Raises:
            SpaceError: Names the first widths for which something disagrees, and the quantity; or
                the module and the operation that do not run.
        """
        rng = random.Random(seed)
        asked = {
            "narrowest": [axis.min_width for axis in self.axes],
            "widest": [axis.max_width for axis in self.axes],
        }
        for i in range(vectors):
            asked[f"random {i + 1}"] = [rng.choice(axis.grid) for axis in self.axes]
        networks = {called: self.widths(vector) for called, vector in asked.items()}
        for called, widths in networks.items():
            said = self.cost(widths)
            try:
                counted = run_and_count(self._built(widths, seed, device), self.input_shape, device)
                for quantity in ("macs", "params", "activations"):
                    a, b = getattr(counted, quantity), getattr(said, quantity)
                    if a != b:
                        raise SpaceError(f"its {quantity} are {a:,}, but the space says {b:,}")
            except SpaceError as error:
                vector = ", ".join(map(str, widths.vector))
                raise SpaceError(
                    f"space {self.name!r} does not hold at its {called} widths [{vector}]: {error}"
                ) from error
        return CheckReport(networks, str(device))

    def _built(self, widths: Widths, seed: int, device: str | torch.device) -> nn.Module:
        try:
            return self.build(widths, seed=seed, device=device)
        except Exception as error:
            raise SpaceError(f"it cannot be built: {first_line(error)}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_forms"} | {"_forms": {}}
