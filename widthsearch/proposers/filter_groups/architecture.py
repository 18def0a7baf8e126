"""Branched architectures: the branches of each convolution, as plain integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from torch import nn

from widthsearch.errors import WidthsError
from widthsearch.modules.tree import join
from widthsearch.space.search_space import SearchSpace
from widthsearch.tracing.polynomials import evaluate
from widthsearch.utils.validation import explain
from widthsearch.widths import Widths


@dataclass(frozen=True)
class Branch:
    """A part of a convolution: some of its filters, applied to some of its input channels.

    Attributes:
        filters: Output channels of the layer, ascending.
        inputs: Input channels of the layer, ascending.

    Example:
        >>> half = Branch(filters=(0, 1), inputs=(0, 2, 3))
        >>> len(half.filters) * len(half.inputs)  # kernels
        6
    """

    filters: tuple[int, ...]
    inputs: tuple[int, ...]


class _Content(BaseModel):
    """The JSON of an architecture."""

    widths: dict[str, Annotated[int, Field(ge=1)]]
    layers: dict[str, Annotated[tuple[Branch, ...], Field(min_length=1)]]


@dataclass(frozen=True)
class BranchedArchitecture:
    """The widths and branches of a network.

    Attributes:
        widths: Widths of the plain space without ties and pins
            (:attr:`SearchSpace.unconstrained`), possibly off its grid. They count channels that no
            branch makes.
        layers: The branches of each layer that has any. At most one branch makes an output channel;
            a channel that none makes is zero.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        >>> space = SearchSpace.from_model(net, (3, 8, 8))
        >>> halves = (Branch((0, 1), (0, 1)), Branch((2, 3), (2, 3)))
        >>> BranchedArchitecture(space.base, {"1": halves}).check(space)
        >>> BranchedArchitecture(space.base, {"1": halves[:1] * 2}).check(space)
        Traceback (most recent call last):
        widthsearch.errors.WidthsError: one branch makes a channel, but two of layer '1' make 0
    """

    widths: Widths
    layers: Mapping[str, tuple[Branch, ...]]

    def to_json(self) -> dict[str, Any]:
        """The architecture as plain JSON values, see :meth:`from_json`."""
        content = _Content.model_construct(widths=self.widths.to_json(), layers=self.layers)
        return content.model_dump(mode="json")

    @classmethod
    def from_json(cls, content: Any, space: SearchSpace) -> BranchedArchitecture:
        """Read the values of :meth:`to_json`, which may have been edited.

        Args:
            content: The content of a JSON file, or of a proposal's provenance.
            space: The plain space of the architecture.

        Raises:
            WidthsError: The values do not fit the space: one line that names the culprit.
        """
        try:
            read = _Content.model_validate(content)
        except ValidationError as error:
            raise WidthsError(explain(error, {"": _Content}, "architecture")) from None
        plain = space.unconstrained
        if odd := sorted(set(read.widths) ^ set(plain.names)):
            raise WidthsError(
                f"`widths` must name the {len(plain.names)} axes of space {plain.name!r}, but "
                f"{odd[0]!r} is in one of the two alone"
            )
        for axis in plain.trace.axes:
            if read.widths[axis.name] % axis.divisor:
                raise WidthsError(
                    f"axis {axis.name!r} takes multiples of {axis.divisor}, but `widths` has "
                    f"{read.widths[axis.name]!r}"
                )
        widths = Widths(plain.names, tuple(read.widths[name] for name in plain.names))
        made = cls(widths, read.layers)
        made.check(space)
        return made

    def check(self, space: SearchSpace) -> None:
        """Check that the branches fit the layers of a space.

        Raises:
            WidthsError: A layer cannot have branches, a channel does not exist, is listed twice or
                out of order, or a branch is empty.
        """
        for layer, branches in self.layers.items():
            outputs, inputs = self.sizes(space, layer)
            made: set[int] = set()
            for number, branch in enumerate(branches):
                for what, count in (("filters", outputs), ("inputs", inputs)):
                    channels = getattr(branch, what)
                    where = f"`{what}` of branch {number} of layer {layer!r}"
                    if not channels:
                        raise WidthsError(f"{where} must not be empty; leave the branch out")
                    if any(a >= b for a, b in pairwise(channels)):
                        raise WidthsError(f"{where} must ascend without repeats")
                    if not 0 <= channels[0] <= channels[-1] < count:
                        odd = channels[0] if channels[0] < 0 else channels[-1]
                        raise WidthsError(f"{where} must lie in 0 to {count - 1}, but one is {odd}")
                if both := sorted(made.intersection(branch.filters)):
                    raise WidthsError(
                        f"one branch makes a channel, but two of layer {layer!r} make {both[0]}"
                    )
                made.update(branch.filters)

    def sizes(self, space: SearchSpace, layer: str) -> tuple[int, int]:
        """The numbers of output and input channels of a layer.

        Raises:
            WidthsError: The layer cannot have branches.
        """
        if not branchable(space, layer):
            module = dict(space.model.template.named_modules()).get(layer)
            raise WidthsError(
                f"a layer with branches must be an ungrouped Conv2d that runs, but {layer!r} is "
                f"{'no layer' if module is None else type(module).__name__} of space "
                f"{space.name!r}"
            )
        trace = space.unconstrained.trace
        outputs, inputs, *_ = trace.shapes[join(layer, "weight")]
        x = trace.variables(self.widths.vector)
        return evaluate(outputs, x), evaluate(inputs, x)


def branchable(space: SearchSpace, layer: str) -> bool:
    """Whether a layer can have branches: an ungrouped Conv2d, of no subclass, that is called."""
    module = dict(space.model.template.named_modules()).get(layer)
    return type(module) is nn.Conv2d and module.groups == 1 and layer in space.trace.layer_macs
