"""What networks of other widths keep from the base: numbers and contents that no constructor gives.

A constructor that is called with the wanted widths computes everything anew. What is left: numbers
in a module that was given as an object, numbers that a constructor writes out as literals, and
arguments that several widths ask for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from widthsearch.modules.initialisation import Scheme
from widthsearch.modules.replay import Replay
from widthsearch.modules.source import assignment_of, names_in_forward
from widthsearch.modules.tree import join, tensors_of
from widthsearch.tracing.constructor import Constructor
from widthsearch.tracing.polynomials import as_constant
from widthsearch.tracing.trace import Trace


@dataclass(frozen=True)
class Leftover:
    """A number or a content that does not follow the widths.

    Attributes:
        layer: The first module that holds it; empty for the model itself.
        kind: The module's class.
        name: The attribute or the tensor.
        reason: What networks of other widths have instead.
        place: The line that sets it.
        count: How many modules of the class have it.

    Example:
        >>> print(Leftover("0", nn.Linear, "scale", "stays at 0.25", "net.py:7", count=3))
        '0.scale' of Linear (net.py:7) stays at 0.25, and in 2 more
    """

    layer: str
    kind: type
    name: str
    reason: str
    place: str
    count: int = 1

    def __str__(self) -> str:
        where = f"{join(self.layer, self.name)!r} of {self.kind.__name__} ({self.place})"
        others = f", and in {self.count - 1} more" if self.count > 1 else ""
        return f"{where} {self.reason}{others}"


def leftovers(
    template: nn.Module, trace: Trace, scheme: Scheme, constructor: Constructor | None
) -> tuple[Leftover, ...]:
    """What networks of other widths keep from the base, once per class and name.

    Args:
        template: The model on the meta device.
        trace: Its trace.
        scheme: How tensors are filled that no constructor fills.
        constructor: The model's own constructors; None where it was given as a module.
    """
    replay = constructor.replay if constructor else None
    other = constructor.example if constructor else None
    found = [*_contents(template, trace, scheme, None if replay is None else replay.unexplained)]
    found += _stale(template, trace, other, replay)
    if constructor is not None:
        if constructor.failure is not None:
            reason = f"is not called: networks are copies, since {constructor.failure}"
            found.append(Leftover("", type(template), "__init__", reason, constructor.failed_at))
        for (layer, name), value in constructor.kept.items():
            reason = f"stays at the base's {value}, or costs would be others"
            found.append(_leftover(layer, template.get_submodule(layer), name, reason))
    for line in sorted(replay.unloaded) if replay else ():
        reason = "is called at the base's widths alone: networks of other widths start anew"
        found.append(Leftover("", type(template), "load_state_dict", reason, line))
    if replay is not None and other is not None and replay.torn:
        held = replay.without_torn()
        for (call, argument), (_, *others) in replay.torn.items():
            module, made = template.get_submodule(call.names[0]), other.get_submodule(call.names[0])
            without = vars(held.get_submodule(call.names[0])) if held is not None else {}
            for name, value in vars(module).items():
                if isinstance(value, float) and vars(made).get(name) not in (
                    value,
                    without.get(name),  # it follows another argument
                ):
                    reason = (
                        f"follows one of the widths that its argument {argument!r} gives, and not "
                        f"that of {others[0].name!r}"
                    )
                    found.append(_leftover(call.names[0], module, name, reason))
    grouped: dict[tuple[type, str], Leftover] = {}
    for each in found:
        first = grouped.setdefault((each.kind, each.name), replace(each, count=0))
        grouped[each.kind, each.name] = replace(first, count=first.count + 1)
    return tuple(grouped.values())


def _leftover(layer: str, module: nn.Module, name: str, reason: str) -> Leftover:
    attribute = name.replace("[", ".").partition(".")[0]
    return Leftover(layer, type(module), name, reason, assignment_of(type(module), attribute))


def _contents(
    template: nn.Module, trace: Trace, scheme: Scheme, unexplained: Set[str] | None
) -> Iterator[Leftover]:
    """Random tensors with a free width that no constructor fills."""
    for module, layer, name, _ in tensors_of(template):
        key = join(layer, name)
        free = any(as_constant(n) is None for n in trace.shapes[key])
        if free and key in scheme.moments and (unexplained is None or key in unexplained):
            mean, std = scheme.moments[key]
            yield _leftover(
                layer, module, name, f"starts with the base's mean {mean:.3g} and std {std:.3g}"
            )


def _stale(
    template: nn.Module, trace: Trace, other: nn.Module | None, replay: Replay | None
) -> Iterator[Leftover]:
    """Attributes that a free width may have given, and that are the same at other widths.

    A module whose constructor is given its widths has computed them from these.
    """
    given = {
        name
        for call, leaves in (replay.follows if replay else {}).items()
        if any(f.where is not None for (name, _), f in leaves.items() if not name.startswith("#"))
        for name in call.names
    }
    free: dict[str, set[int]] = {}
    for _, layer, name, tensor in tensors_of(template):
        for n, poly in zip(tensor.shape, trace.shapes[join(layer, name)], strict=True):
            if as_constant(poly) is None:  # and in units: each of two chunks, a head
                free.setdefault(layer, set()).update({n, n // math.gcd(*poly.values())})
    for layer, module in template.named_modules():
        near = [layer, *(join(layer, name) for name, _ in module.named_children())]
        sizes = set().union(*(free.get(name, ()) for name in near))
        again = None if other is None else other.get_submodule(layer)
        remade = {} if again is None else {name: n for name, n, _ in _closed_over(again)}
        for name, number, place in _closed_over(module):
            if _given_by(number, sizes) and remade.get(name, number) == number:
                reason = f"stays at the base's {number:.6g}"
                yield Leftover(layer, type(module), name, reason, place)
        if layer in given or type(module).__module__.startswith("torch."):
            continue
        made = {} if again is None else dict(_numbers(again))
        for name, number in _numbers(module):
            if (layer, name) in trace.attributes or not _given_by(number, sizes):
                continue
            if made.get(name, number) == number:
                yield _leftover(layer, module, name, f"stays at the base's {number:.6g}")


def _numbers(module: nn.Module) -> Iterator[tuple[str, float]]:
    """The numbers that forward may read, also in sequences, mappings and objects."""
    names = names_in_forward(module)
    for name, value in vars(module).items():
        if isinstance(value, Mapping):
            within = {f"{name}.{key}": item for key, item in value.items()}
        elif isinstance(value, list | tuple):
            within = {f"{name}[{i}]": item for i, item in enumerate(value)}
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type):
            within = {f"{name}.{key}": item for key, item in vars(value).items() if key in names}
        else:
            within = {name: value}
        for place, item in within.items() if name in names else ():
            number = _number(item)
            if number is not None:
                yield place, number


def _closed_over(module: nn.Module) -> Iterator[tuple[str, float, str]]:
    """The numbers of functions that were set on a module, or are its hooks, with their lines."""
    held = {key: value for key, value in vars(module).items() if not isinstance(value, Mapping)}
    for value in vars(module).values():
        held.update(value if isinstance(value, Mapping) else {})
    for value in held.values():
        if isinstance(value, FunctionType):
            code, cells = value.__code__, value.__closure__ or ()
            for name, cell in zip(code.co_freevars, cells, strict=True):
                with suppress(ValueError):  # an empty cell
                    if (number := _number(cell.cell_contents)) is not None:
                        yield name, number, f"{Path(code.co_filename).name}:{code.co_firstlineno}"


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return None if value.is_complex() else float(value)
    return value if type(value) in (int, float) else None


def _given_by(number: float, sizes: Set[int]) -> bool:
    """Whether a number is a size from 8 on, its root, or the inverse of one of both."""
    if not 1e-20 < number < 1e20:  # no size, and its powers may not be finite
        return False
    powers = (1, 2, -1, -2) if type(number) is not int else (1,)
    return any(
        math.isclose(number**power, n, rel_tol=1e-5) for power in powers for n in sizes if n >= 8
    )
