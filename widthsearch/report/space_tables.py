"""Search spaces and proposals as tables and as JSON values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from widthsearch.report.console import short, uncut

if TYPE_CHECKING:
    from widthsearch.proposers import Proposal
    from widthsearch.space.search_space import SearchSpace
    from widthsearch.widths import Widths


def space_tables(space: SearchSpace) -> Group:
    """A space as tables: its axes with their shares of MACs, and its pinned widths with reasons."""
    cost = space.cost(space.base)
    shares = space.cost_form("macs").share(space.base.vector)
    axes = Table(
        title=f"{space.name}: {len(space.axes)} axes, input {_shape_text(space.input_shape)}"
    )
    axes.add_column("axis", no_wrap=True)
    for column in ("base", "min", "max", "step", "MACs"):
        axes.add_column(column, justify="right", no_wrap=True)
    axes.add_column("layers")
    for axis, share in zip(space.axes, shares, strict=True):
        axes.add_row(
            Text(axis.name),
            *(str(getattr(axis, field)) for field in ("base", "min_width", "max_width", "step")),
            f"{share:.1%}",
            Text(_shown(axis.layers) + (f"; {len(axis.tied)} tied to it" if axis.tied else "")),
        )
    pinned = Table(title="pinned widths")
    for column in ("width of", "size", "MACs", "reason", "layers"):
        counted, whole = column in ("size", "MACs"), column not in ("reason", "layers")
        pinned.add_column(column, justify="right" if counted else "left", no_wrap=whole)
    for pin, share in zip(space.pinned, space.trace.pinned_shares(), strict=True):
        pinned.add_row(
            Text(pin.name),
            str(pin.size),
            f"{share:.1%}",
            Text(pin.reason),
            Text(_shown(pin.layers)),
        )
    total = Text(
        f"base: {short(cost.macs)} MACs ({short(2 * cost.macs)} FLOPs), {short(cost.params)} "
        f"parameters, {short(cost.activations)} activation elements a sample. MACs: the share that "
        "would be saved without the width; shares overlap, since a layer has two widths."
    )
    parts: list[RenderableType] = [uncut(axes)]
    if space.pinned:
        parts.append(uncut(pinned))
    parts += [Text(f"kept from the base: {leftover}") for leftover in space.leftovers]
    return Group(*parts, total)


def space_json(space: SearchSpace) -> dict[str, Any]:
    """A space as JSON values."""
    shares = space.cost_form("macs").share(space.base.vector).tolist()
    pinned = [
        {key: getattr(pin, key) for key in ("name", "size", "reason", "layers")}
        for pin in space.pinned
    ]
    return {
        "name": space.name,
        "fingerprint": space.fingerprint,
        "input_shape": _shapes(space.input_shape),
        **asdict(space.cost(space.base)),
        "axes": _with_shares(map(asdict, space.axes), shares),
        "pinned": _with_shares(pinned, space.trace.pinned_shares()),
        "leftovers": [str(leftover) for leftover in space.leftovers],
    }


def _with_shares(widths: Iterable[dict[str, Any]], shares: Iterable[float]) -> list[dict[str, Any]]:
    return [each | {"share_of_macs": share} for each, share in zip(widths, shares, strict=True)]


def cost_line(space: SearchSpace, widths: Widths) -> str:
    """The costs of a width vector, each with its ratio to the base's.

    Example:
        >>> from torch import nn
        >>> from widthsearch import SearchSpace
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
        >>> space = SearchSpace.from_model(model, (3, 8, 8))
        >>> cost_line(space, space.widths(0.5))
        '6.19k MACs (0.5 of the base), 260 parameters (0.504), 208 activation elements (0.591)'
    """
    cost, base = space.cost(widths), space.cost(space.base)
    return (
        f"{short(cost.macs)} MACs ({cost.macs / base.macs:.3g} of the base), "
        f"{short(cost.params)} parameters ({cost.params / base.params:.3g}), "
        f"{short(cost.activations)} activation elements ({cost.activations / base.activations:.3g})"
    )


def proposal_json(space: SearchSpace, widths: Widths, proposal: Proposal) -> dict[str, Any]:
    """Proposed widths, their costs and the proposal that they belong to, as JSON values."""
    return {
        "space": space.name,
        "fingerprint": space.fingerprint,
        "method": proposal.method,
        "widths": dict(widths),
        "cost": asdict(space.cost(widths)),
        "base": asdict(space.cost(space.base)),
        "proposal": proposal.to_json(),
    }


def _shapes(inputs: Any) -> Any:
    """The shapes of a model's inputs as JSON values, nested as the inputs are."""
    if isinstance(inputs, Mapping):
        return {name: _shapes(value) for name, value in inputs.items()}
    return [n if isinstance(n, int) else _shapes(n) for n in getattr(inputs, "shape", inputs)]


def _shape_text(inputs: Any) -> str:
    shapes = _shapes(inputs)
    plain = isinstance(shapes, list) and all(isinstance(n, int) for n in shapes)
    return "×".join(map(str, shapes)) if plain else json.dumps(shapes)


def _shown(layers: Sequence[str], room: int = 30) -> str:
    """The number of layers, and as many of their names as fit into ``room`` cells."""
    names = [layer or "(model)" for layer in layers]
    shown = names[:1]
    while len(shown) < len(names) and len(", ".join([*shown, names[len(shown)]])) <= room:
        shown.append(names[len(shown)])
    more = ", …" if len(shown) < len(names) else ""
    return f"{len(names)}: {', '.join(shown)}{more}"
