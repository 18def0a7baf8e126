"""The integers that a model's constructors are to be given, so that its tensors get other sizes.

Notation: the *base* is the model as given. A *size* is one dim of a tensor, or an attribute that
repeats one. ``samples`` holds each size at the base and at some other widths, which tells apart the
sizes that are equal at the base alone. An argument with the value ``v`` at the base is *probed*:
its constructor runs once more with ``v'`` for it. A size that was ``u`` and becomes ``u'`` has the
slope ``s = (u' - u) / (v' - v)``; where the trace demands the size ``n``, the argument must be
``(n - (u - s·v)) / s``.

Worked example: ``Attention(dim=32)`` makes ``nn.Linear(dim, 3 * dim)``. With 64 for 32, the dims
(96, 32) of the weight become (192, 64): the slopes are 3 and 1. A trace that demands (3·q, a) there
asks for ``dim = q`` by the first and for ``dim = a`` by the second. The inputs' side goes first, so
``dim`` follows ``a``, and the layer's own argument is exchanged where the layer is made.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from widthsearch.modules.arguments import bound, integers, untouched, with_integers
from widthsearch.modules.construction import Call, Frame, Recording
from widthsearch.modules.probing import (
    SAME_RESTS,
    Leaf,
    Prober,
    Responses,
    Where,
    flags_of,
    members_of,
)
from widthsearch.modules.source import names_in_forward
from widthsearch.modules.tree import SIZED, join
from widthsearch.torch_internals import tree_leaves


@dataclass(frozen=True)
class Follows:
    """A number that follows a size: ``(size - offset) / slope``; without a size, ``offset``.

    Example:
        >>> thirds = Follows(("qkv.weight", 0), slope=Fraction(3), offset=Fraction(0))
        >>> thirds.value({("qkv.weight", 0): 96})
        32
        >>> Follows(None, Fraction(1), offset=Fraction(5)).value({})
        5
    """

    where: Where | None
    slope: Fraction
    offset: Fraction

    @property
    def name(self) -> str:
        """The tensor whose size it is, or the layer whose attribute."""
        return self.where[0] if self.where else ""

    def value(self, sizes: Mapping[Where, int]) -> int:
        """The number at these sizes."""
        if self.where is None:
            return int(self.offset)
        return round((sizes[self.where] - self.offset) / self.slope)


def fixed(number: int) -> Follows:
    """What a number follows that is the same at all sizes."""
    return Follows(None, Fraction(1), Fraction(number))


class Solver(Prober):
    """Runs the function at the base's widths and finds what each number in a call follows.

    Args:
        recording: The recorded calls.
        samples: Each size at the base and at some random widths.
        repeated: The same for attributes in which torch's layers repeat their tensors' sizes.
        sizing: Calls in which the sizes of torch's own functions are sought too.

    Attributes:
        follows: What was found.
        uncertain: Calls with a number that cannot change and that nothing explains.
        torn: Numbers that several widths ask for, with what each follows for each of them.
        misfits: Attributes that ask for another number than tensors in proportion to it.
        rivals: Pairs of attributes of one module that ask one of its numbers for different widths.
        partners: Pairs of a tensor's size and an attribute that one number gives.

    Example:
        >>> from widthsearch.modules.construction import record
        >>> model, recorder = record(lambda: nn.Sequential(nn.Linear(3, 4)))
        >>> recording = recorder.recording
        >>> solver = Solver(recording, {("0.weight", 0): (4, 7, 9)}, {})
        >>> model = solver.run(recording.make_model)
        >>> [leaf for leaves in solver.follows.values() for leaf, f in leaves.items() if f.where]
        [('out_features', ())]
    """

    def __init__(
        self,
        recording: Recording,
        samples: Mapping[Where, tuple[int, ...]],
        repeated: Mapping[Where, tuple[int, ...]],
        sizing: Iterable[Call] = (),
    ) -> None:
        super().__init__(recording.root, recording.classes)
        self.samples, self.repeated = samples, repeated
        self._count = len(next(iter(samples.values()), ()))
        self._alike: dict[tuple[Fraction, ...], list[Where]] = defaultdict(list)
        for where, sizes in samples.items():
            self._alike[_relative(sizes)].append(where)
        self.follows: dict[Call, dict[Leaf, Follows]] = {}
        self.torn: dict[tuple[Call, str], list[Follows]] = {}
        self.misfits: set[Where] = set()
        self.rivals: list[tuple[Follows, Follows]] = []
        self.partners: list[tuple[Follows, Follows]] = []
        self.uncertain: set[Call] = set()
        self._sizing = frozenset(sizing)
        self._sizings: dict[Call, list[tuple[int, Any]]] = {}

    # -- the run ----------------------------------------------------------------------------------

    def construct(self, frame: Frame, original: Any, args: Any, kwargs: Any) -> None:  # noqa: D102
        arguments = bound(original, args, kwargs)
        if self.probing(frame, original, args, kwargs, arguments):
            return
        given = {name: untouched(value) for name, value in arguments.arguments.items()}
        original(*args, **kwargs)
        self.leave(frame)
        arguments.arguments.update(given)
        del given[next(iter(given))]  # the module
        frame.call.numbers = {
            (name, path): v for name, value in given.items() for path, v in integers(value)
        }
        frame.call.members, frame.call.flags = members_of(args[0]), flags_of(args[0])
        if frame.call.names:
            self.follows[frame.call] = dict(self._solved(frame, original, arguments))
        self.finished[frame.call] = type(args[0]), given, untouched(vars(args[0]))

    def fits(self, call: Call, source: nn.Module) -> bool:  # noqa: D102
        return False  # so that calls within copies are seen too

    def sized(self, frame: Frame, number: int, args: Any, kwargs: Any) -> Any:  # noqa: D102
        if self.probed is None:
            if frame.call in self._sizing:
                self._sizings.setdefault(frame.call, []).append((number, (args, kwargs)))
        elif frame is self.probed:
            numbers = {path: v for (name, path), v in self.changes.items() if name == f"#{number}"}
            args, kwargs = with_integers((args, kwargs), numbers)
        return args, kwargs

    # -- a call -----------------------------------------------------------------------------------

    def _solved(
        self, frame: Frame, original: Any, arguments: Any
    ) -> Iterator[tuple[Leaf, Follows]]:
        """What the numbers of a call follow."""
        layer = frame.call.names[0]
        prefix = f"{layer}." if layer else ""
        within = [v for (name, _), v in self.samples.items() if f"{name}.".startswith(prefix)]
        free = {values[0] for values in within if len(set(values)) > 1}
        leaves = dict(frame.call.numbers)
        if not free:
            for leaf, v in leaves.items() if within else ():
                yield leaf, fixed(v)
            return
        for number, value in self._sizings.get(frame.call, ()):
            leaves.update({(f"#{number}", path): v for path, v in integers(value)})
        wide = frame.call in self._sizing
        equal: dict[int, dict[Leaf, Follows | None]] = {}
        known: dict[int, list[Leaf]] = {}
        alone: dict[Leaf, Responses] = {}
        for leaf, v in leaves.items():
            repeated = self._repeated(frame.module, layer, leaf, v)
            if isinstance(frame.module, nn.GroupNorm) and leaf[0] == "num_groups":
                if repeated is not None and repeated.where is not None:
                    yield leaf, repeated
                else:  # the user's code gives it, if it fits: no size depends on it
                    self.uncertain.add(frame.call)
            elif repeated is not None:
                yield leaf, repeated
                if repeated.where is not None:
                    known.setdefault(v, []).append(leaf)
            elif v > 1 and (wide or any(_related(v, size) for size in free)):
                responses, found = self._probed(frame, original, arguments, (leaf,), v)
                if responses is None or found is not None:
                    equal.setdefault(v, {})[leaf] = found
                    alone[leaf] = responses or {}
        solved: dict[Leaf, Follows] = {}
        for v, group in equal.items():
            for joint in _joints(group):
                # Some numbers only change together: channels and groups, widths that are compared.
                changed = [leaf for leaf in joint if not _is_free(group[leaf])]
                if None in map(group.get, joint):
                    responses = self.responses(frame, original, arguments, joint, v)
                    rest = tuple(leaf for leaf in joint if leaf not in changed)
                    without = rest and self.responses(frame, original, arguments, rest, v)
                    if without and self._sized(layer, without) == self._sized(layer, responses):
                        continue  # no size depends on the others: the groups of a norm
                    _, common = self._probed(frame, original, arguments, joint, v)
                    if _is_free(common):
                        group.update(dict.fromkeys(changed, common))
                        alone.update({leaf: {} for leaf in changed})
            for leaf in [leaf for leaf, of in group.items() if of is None and v in known]:
                # Groups of a subclass of a convolution, of which torch's names are known.
                _, common = self._probed(frame, original, arguments, (leaf, *known[v]), v)
                if _is_free(common):
                    group[leaf], alone[leaf] = common, {}
            if None in group.values():
                self.uncertain.add(frame.call)
            compared = _compared(self, arguments, v) if None in group.values() else None
            solved.update({leaf: f for leaf, of in group.items() if (f := of or compared)})
        _hold_explained(frame.call, solved, alone, self.samples)
        self._hold_factors(frame, original, arguments, solved, alone)
        yield from solved.items()

    def _probed(
        self, frame: Frame, original: Any, arguments: Any, leaves: tuple[Leaf, ...], v: int
    ) -> tuple[Responses | None, Follows | None]:
        """The sizes that change with numbers, and what they follow.

        Where multiples of them give sizes that nothing explains, the next are those that leave the
        same rest in a division: ``n // 3`` of a width in three parts has one slope among these.
        """
        name = leaves[0][0] if len(leaves) == 1 else ""
        for step in (0, SAME_RESTS):
            responses = self.responses(frame, original, arguments, leaves, v, step)
            found = self._answer(frame.call, name, responses, v)
            if found is not None or responses is None:
                break
        return responses, found

    def _sized(self, layer: str, responses: Responses | None) -> Responses:
        """The responses of tensors, and of attributes that follow a width."""
        return {
            (within, of): found
            for (within, of), found in (responses or {}).items()
            if isinstance(of, int) or (join(layer, within) if within else layer, of) in self.samples
        }

    def _hold_factors(
        self,
        frame: Frame,
        original: Any,
        arguments: Any,
        solved: dict[Leaf, Follows],
        alone: Mapping[Leaf, Responses],
    ) -> None:
        """Let one factor of a size follow it, where several numbers would: heads or their width.

        The factor that stays is one that forward reads and the trace fixes, if there is one.
        """
        numbers = {**frame.call.numbers}
        alike: dict[tuple[Fraction, ...], list[Leaf]] = defaultdict(list)
        for leaf, follows in solved.items():
            if follows.where is not None and leaf in numbers and alone[leaf]:
                alike[_relative(self.samples[follows.where])].append(leaf)
        for leaves in alike.values():
            while len(leaves) > 1:
                after = self.together(frame, original, arguments, {v: numbers[v] for v in leaves})
                wrong = [
                    where
                    for where, n in after.items()
                    if sum(where in alone[leaf] for leaf in leaves) > 1
                    and n != 2 * next(alone[v][where][0] for v in leaves if where in alone[v])
                ]
                if not wrong:
                    break
                factors = [leaf for leaf in leaves if any(where in alone[leaf] for where in wrong)]
                held = max(
                    reversed(factors),
                    key=lambda leaf: (
                        any(self._is_read(frame, where) for where in alone[leaf]),
                        sum(where in alone[leaf] for where in wrong),
                    ),
                )
                solved[held] = fixed(numbers[held])
                leaves.remove(held)

    def _is_read(self, frame: Frame, where: Where) -> bool:
        """Whether forward reads an attribute, which the trace fixes."""
        within, name = where
        if isinstance(name, int):
            return False
        assert frame.module is not None
        module = frame.module.get_submodule(within)
        place = join(frame.call.names[0], within) if within else frame.call.names[0]
        return (
            (place, name) not in self.samples
            and not isinstance(module, SIZED)
            and name.partition("[")[0] in names_in_forward(module)
        )

    def _repeated(self, module: Any, layer: str, leaf: Leaf, v: int) -> Follows | None:
        """What an argument follows that one of torch's layers keeps as an attribute."""
        if not isinstance(module, SIZED):
            return None
        name, path = leaf
        if isinstance(module, nn.RNNBase) and name in ("args", "kwargs"):
            ((_, key),) = path
            name, path = (
                ("input_size", "hidden_size")[key] if name == "args" and key < 2 else key,
                (),
            )
        for attribute in (f"{name}[{path[0][1]}]" if path else name, f"{name}[0]"):
            values = self.repeated.get((layer, attribute))
            if values is not None and values[0] == v:
                return self._proportional(layer, values)
        return None

    def _proportional(self, layer: str, values: tuple[int, ...]) -> Follows | None:
        """The size that values are a multiple of, of the layer itself if possible."""
        if len(set(values)) == 1:
            return fixed(values[0])
        own = f"{layer}." if layer else ""
        found: dict[tuple[bool, bool], Follows] = {}
        for where in self._alike[_relative(values)]:
            slope = Fraction(self.samples[where][0], values[0])
            rank = f"{where[0]}.".startswith(own), slope == 1
            found.setdefault(rank, Follows(where, slope, Fraction(0)))
        return found[max(found)] if found else None

    def _answer(self, call: Call, name: str, responses: Responses | None, v: int) -> Follows | None:
        """What a number follows that is ``v`` at the base, by the sizes that changed with it."""
        layer = call.names[0]
        answers: dict[tuple[Fraction, ...], Follows] = {}
        votes: Counter[tuple[Fraction, ...]] = Counter()
        by_tensors: set[tuple[Fraction, ...]] = set()
        for (within, dim), (u, slope) in (responses or {}).items():
            where = join(layer, within) if within else layer, dim
            sizes = self.samples.get(where)
            if sizes is None or sizes[0] != u:
                continue
            offset = u - slope * v
            wanted = tuple((size - offset) / slope for size in sizes)
            if all(x.denominator == 1 and x > 0 for x in wanted):
                answers.setdefault(wanted, Follows(where, slope, offset))
                votes[wanted] += 1
                if isinstance(dim, int) and not offset:  # others follow further numbers too
                    by_tensors.add(wanted)
        base = (Fraction(v),) * self._count
        free = [wanted for wanted in answers if wanted != base]
        if not free:
            return fixed(v) if base in answers else None
        # A size with an offset follows further numbers too, so it asks after one that has none.
        free.sort(key=lambda x: bool(not _by_attribute(answers[x]) and answers[x].offset))
        first = answers[free[0]]
        self._note_partners(layer, [answers[wanted] for wanted in free], responses or {}, v)
        if not _by_attribute(first):
            if votes[base] > votes[free[0]]:
                return fixed(v)
            if len(free) > 1:
                self.torn[call, name] = [answers[wanted] for wanted in free]
            return first
        assert first.where is not None
        if free[0] not in by_tensors and not by_tensors.isdisjoint(free):
            self.misfits.add(first.where)
        own = [of for wanted in free if _by_attribute(of := answers[wanted]) and of.name == layer]
        self.rivals += [(first, other) for other in own[1:] if own[0] is first]
        return first

    def _note_partners(
        self, layer: str, answers: list[Follows], responses: Responses, v: int
    ) -> None:
        """Note the free attributes that a number gives beside the first tensor that asks for it."""
        tensor = next((answer for answer in answers if not _by_attribute(answer)), None)
        for (within, name), (u, slope) in responses.items():
            where = join(layer, within) if within else layer, name
            sizes = self.samples.get(where, ())
            if tensor and isinstance(name, str) and len(set(sizes)) > 1 and sizes[0] == u:
                self.partners.append((tensor, Follows(where, slope, u - slope * v)))


def _compared(solver: Solver, arguments: Any, v: int) -> Follows | None:
    """The last width of the modules among the arguments that is ``v`` at the base, if any.

    A constructor that compares a number with the outputs of a module that it is given refuses any
    other number.
    """
    _, *given = tree_leaves((*arguments.args, *arguments.kwargs.values()))
    calls = [c for m in given if isinstance(m, nn.Module) and (c := solver.call_of(m))]
    within = tuple(f"{name}." for call in calls for name in call.names)
    free = [where for where, n in solver.samples.items() if n[0] == v and len(set(n)) > 1]
    found = [where for where in free if f"{where[0]}.".startswith(within)]
    return Follows(found[-1], slope=Fraction(1), offset=Fraction(0)) if found else None


def _hold_explained(
    call: Call,
    solved: dict[Leaf, Follows],
    alone: Mapping[Leaf, Responses],
    samples: Mapping[Where, tuple[int, ...]],
) -> None:
    """Let a number stay where others give the size that it would follow.

    Example: ``Linear(length + (length + ahead) * features, 64)`` has another size because
    ``features`` follows the width of a layer; then ``length`` need not change.
    """
    for leaf, follows in solved.items():
        if follows.where is None or not follows.offset or leaf not in call.numbers:
            continue  # a size without an offset follows no further number
        sizes = samples[follows.where]
        given = [Fraction(sizes[0])] * len(sizes)
        for other, of in solved.items():
            if other == leaf or of.where is None or other not in call.numbers:
                continue
            for (within, dim), (_, slope) in alone[other].items():
                if (join(call.names[0], within) if within else call.names[0], dim) == follows.where:
                    of_other = [(n - of.offset) / of.slope for n in samples[of.where]]
                    given = [
                        n + slope * (m - call.numbers[other])
                        for n, m in zip(given, of_other, strict=True)
                    ]
        if given == list(sizes):
            solved[leaf] = fixed(call.numbers[leaf])


def _is_free(follows: Follows | None) -> bool:
    return follows is not None and follows.where is not None


def _joints(group: Mapping[Leaf, Follows | None]) -> Iterator[tuple[Leaf, ...]]:
    """Sets of equal numbers that may only change together, the likeliest first.

    Args:
        group: What each follows by itself; None where its constructor refuses another number.
    """
    failed = [leaf for leaf, found in group.items() if found is None]
    named: dict[str, list[Leaf]] = defaultdict(list)
    for name, path in failed:
        named[next((key for _, key in reversed(path) if isinstance(key, str)), name)].append(
            (name, path)
        )
    still = [leaf for leaf, found in group.items() if not _is_free(found)]
    sets = dict.fromkeys(map(tuple, (*named.values(), failed, still, group)))
    return (joint for joint in sets if len(joint) > 1)


def _by_attribute(follows: Follows) -> bool:
    """Whether a number follows an attribute, which forward computes with."""
    return follows.where is not None and isinstance(follows.where[1], str)


def _relative(sizes: tuple[int, ...]) -> tuple[Fraction, ...]:
    """Sizes as multiples of the base's."""
    return tuple(Fraction(size, max(1, sizes[0])) for size in sizes)


def _related(a: int, b: int) -> bool:
    """Whether one number is a small multiple of the other, or that with a rest of the division."""
    small, large = sorted((a, b))
    return large <= 16 * small and (large % small == 0 or (a > b and a // (a // b) == b))
