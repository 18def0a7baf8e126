"""Search spaces and proposals as tables and as JSON values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from widthsearch.proposers import Proposal
from widthsearch.report.console import short, uncut
from widthsearch.space.search_space import SearchSpace
from widthsearch.widths import Widths


def space_tables(space: SearchSpace) -> Group:
    """A space as tables: its axes, with their share of MACs, and what is pinned and why."""
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
    pinned = Table(title="pinned")
    for column in ("width of", "size", "MACs", "reason", "layers"):
        counted, whole = column in ("size", "MACs"), column not in ("reason", "layers")
        pinned.add_column(column, justify="right" if counted else "left", no_wrap=whole)
    for pin, share in zip(space.pinned, space.pinned_shares, strict=True):
        pinned.add_row(
            Text(pin.name),
            str(pin.size),
            f"{share:.1%}",
            Text(pin.reason),
            Text(_shown(pin.layers)),
        )
    total = Text(
        f"base: {short(cost.macs)} MACs ({short(2 * cost.macs)} FLOPs), {short(cost.params)} "
        f"parameters, {short(cost.activations)} activation elements a sample. A width's share of "
        "MACs is what would vanish with it; shares overlap, since a layer has two widths."
    )
    parts: list[RenderableType] = [uncut(axes)]
    if space.pinned:
        parts.append(uncut(pinned))
    return Group(*parts, total)


def space_json(space: SearchSpace) -> dict[str, Any]:
    """A space as plain JSON values."""
    cost = space.cost(space.base)
    shares = space.cost_form("macs").share(space.base.vector)
    return {
        "name": space.name,
        "fingerprint": space.fingerprint,
        "input_shape": _shapes(space.input_shape),
        "macs": cost.macs,
        "params": cost.params,
        "activations": cost.activations,
        "axes": [
            {
                "name": axis.name,
                "base": axis.base,
                "min_width": axis.min_width,
                "max_width": axis.max_width,
                "step": axis.step,
                "share_of_macs": float(share),
                "layers": list(axis.layers),
                "tied": list(axis.tied),
            }
            for axis, share in zip(space.axes, shares, strict=True)
        ],
        "pinned": [
            {
                "name": pin.name,
                "size": pin.size,
                "reason": pin.reason,
                "share_of_macs": share,
                "layers": list(pin.layers),
            }
            for pin, share in zip(space.pinned, space.pinned_shares, strict=True)
        ],
    }


def cost_line(space: SearchSpace, widths: Widths) -> str:
    """What a width vector costs, and beside the base."""
    cost, base = space.cost(widths), space.cost(space.base)
    return (
        f"{short(cost.macs)} MACs ({cost.macs / base.macs:.3g} of the base), "
        f"{short(cost.params)} parameters ({cost.params / base.params:.3g}), "
        f"{short(cost.activations)} activation elements ({cost.activations / base.activations:.3g})"
    )


def proposal_json(space: SearchSpace, widths: Widths, proposal: Proposal) -> dict[str, Any]:
    """Proposed widths with their costs and where they came from, as plain JSON values."""
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
    """What a model takes, as JSON values: shapes, by place or name."""
    if isinstance(inputs, Mapping):
        return {name: _shapes(value) for name, value in inputs.items()}
    return [n if isinstance(n, int) else _shapes(n) for n in getattr(inputs, "shape", inputs)]


def _shape_text(inputs: Any) -> str:
    shapes = _shapes(inputs)
    plain = isinstance(shapes, list) and all(isinstance(n, int) for n in shapes)
    return "×".join(map(str, shapes)) if plain else json.dumps(shapes)


def _shown(layers: Sequence[str], room: int = 30) -> str:
    """How many layers there are, and as many of their names as there is room for."""
    names = [layer or "(model)" for layer in layers]
    shown = names[:1]
    while len(shown) < len(names) and len(", ".join([*shown, names[len(shown)]])) <= room:
        shown.append(names[len(shown)])
    more = ", …" if len(shown) < len(names) else ""
    return f"{len(names)}: {', '.join(shown)}{more}"
