"""A model made anew at other sizes, by its own constructors.

:class:`Replay` runs the function that makes a model again, with those integers exchanged in the
constructor calls that the wanted sizes ask for. What else follows from the sizes in the user's code
(scales, contents, initialisation, attributes) comes out as that code has it.

Example:
    >>> class Scaled(nn.Module):
    ...     def __init__(self, width: int = 16) -> None:
    ...         super().__init__()
    ...         self.scale = width**-0.5
    ...         self.layer = nn.Linear(3, width)
    >>> from widthsearch.modules.construction import record
    >>> base, recorder = record(Scaled)
    >>> samples = {("layer.weight", 0): (16, 5, 9), ("layer.bias", 0): (16, 5, 9)}
    >>> replay = Replay(recorder.recording, samples, {})
    >>> replay.build({where: 4 for where in samples}).scale
    0.5
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.errors import first_line
from widthsearch.modules.arguments import bound, integers, untouched, with_integers
from widthsearch.modules.construction import (
    Call,
    DivergedError,
    Frame,
    Recording,
    Session,
    kept_generators,
)
from widthsearch.modules.probing import Leaf, Sketch, Where, flags_of, members_of, shapes_of
from widthsearch.modules.solving import Follows, Solver, fixed
from widthsearch.modules.source import model_line
from widthsearch.modules.tree import join, tensors_of
from widthsearch.torch_internals import storage_of


class ConstructionError(Exception):
    """A constructor cannot be called with the numbers that some sizes ask for."""


class Builder(Session):
    """Runs the function with the numbers that certain sizes ask for.

    A constructor that would make other modules at these numbers than at the base's (a shortcut
    where two widths differ) is given the base's for some of them, since the trace holds for the
    base's modules.

    Args:
        recording: The recorded calls, as the solver left them.
        follows: What each number follows.
        sizes: The sizes that are wanted.
        free: The tensors with a free width: what would be loaded into them is not.
        uncertain: The calls with numbers that several widths ask for, or that nothing explains.
        arguments: Per layer, integer arguments that it is given instead.

    Example:
        >>> from widthsearch.modules.construction import record
        >>> _, recorder = record(lambda: nn.Sequential(nn.Linear(3, 4)))
        >>> recording = recorder.recording
        >>> solver = Solver(recording, {("0.weight", 0): (4, 7, 9)}, {})
        >>> base, follows = solver.run(recording.make_model), solver.follows
        >>> builder = Builder(recording, follows, {("0.weight", 0): 6}, set(), set())
        >>> builder.run(recording.make_model)[0]
        Linear(in_features=3, out_features=6, bias=True)
    """

    def __init__(
        self,
        recording: Recording,
        follows: Mapping[Call, Mapping[Leaf, Follows]],
        sizes: Mapping[Where, int],
        free: Set[str],
        uncertain: Set[Call],
        arguments: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    ) -> None:
        super().__init__(recording.root, recording.classes)
        self.follows, self.sizes, self.free, self.arguments = follows, sizes, free, arguments
        self.uncertain = uncertain
        self._skipped: list[Tensor] = []
        self.refusal: Exception | None = None
        self.lenient = True
        self.unloaded: set[str] = set()

    def run(self, make_model: Callable[[], nn.Module]) -> nn.Module:  # noqa: D102
        original = nn.Module.load_state_dict

        def load_state_dict(
            module: nn.Module, /, state_dict: Any, *args: Any, **kwargs: Any
        ) -> Any:
            calls = [call for m in module.modules() if (call := self.call_of(m)) is not None]
            layers = {name for call in calls for name in call.names}
            if any(name.rpartition(".")[0] in layers for name in self.free):
                self.unloaded.add(model_line())
                return original(module, module.state_dict())  # a new network starts anew
            return original(module, state_dict, *args, **kwargs)

        nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]
        try:
            return super().run(make_model)
        finally:
            nn.Module.load_state_dict = original  # type: ignore[method-assign]

    def unwritten(self, model: nn.Module) -> set[str]:
        """The tensors of a model that a constructor could not write to, for their sizes."""
        skipped = set(map(storage_of, self._skipped))
        return {
            join(layer, name)
            for _, layer, name, tensor in tensors_of(model)
            if storage_of(tensor) in skipped
        }

    def construct(self, frame: Frame, original: Any, args: Any, kwargs: Any) -> None:  # noqa: D102
        call, arguments = frame.call, bound(original, args, kwargs)
        given = dict(list(arguments.arguments.items())[1:])
        numbers = {(name, path): v for name, value in given.items() for path, v in integers(value)}
        follows = self.follows.get(call, {})
        numbers.update(
            {leaf: follows[leaf].value(self.sizes) for leaf in follows if leaf in numbers}
        )
        for name in call.names:
            numbers.update({(arg, ()): v for arg, v in self.arguments.get(name, {}).items()})
        moved = [leaf for leaf, v in numbers.items() if call.numbers.get(leaf, v) != v]
        single = [leaf for leaf in moved if leaf in follows or not leaf[1]]
        state = torch.get_rng_state() if moved else None
        pristine = untouched(given) if moved else given
        failure: Exception | None = None
        for kept in ([], *([leaf] for leaf in reversed(single)), moved):
            if failure is not None:
                if state is None:
                    break
                torch.set_rng_state(state)
                vars(frame.module).clear()
                frame.position = frame.sizings = 0
            exchanged = {**numbers, **{leaf: call.numbers[leaf] for leaf in kept}}
            for name, value in given.items():
                wanted = {path: v for (of, path), v in exchanged.items() if of == name}
                if failure is not None:
                    value = untouched(pristine[name])
                unlike = {path: wanted[path] for path, v in integers(value) if wanted[path] != v}
                arguments.arguments[name] = with_integers(value, unlike)
            try:
                original(*arguments.args, **arguments.kwargs)
                self.leave(frame)
                self._compare(frame)
            except ConstructionError:
                raise
            except Exception as error:  # noqa: BLE001  a constructor may refuse in any way
                failure = failure or error
                if not isinstance(error, DivergedError) and call not in self.uncertain:
                    break  # these are the numbers of such a network: the user's class refuses it
            else:
                return
        if isinstance(failure, DivergedError):
            raise failure  # by a decision of its caller, which takes the base's numbers then
        raise ConstructionError(f"{call.kind}: {type(failure).__name__}: {failure}") from failure

    def _compare(self, frame: Frame) -> None:
        """Take the base's decisions: a comparison of widths may come out otherwise at others."""
        assert frame.module is not None
        if members_of(frame.module) != frame.call.members:
            raise DivergedError(f"{frame.call.kind} holds other tensors or modules than the base's")
        for name, value in flags_of(frame.module).items():
            if frame.call.flags.get(name, value) != value:
                setattr(frame.module, name, frame.call.flags[name])

    def sized(self, frame: Frame, number: int, args: Any, kwargs: Any) -> Any:  # noqa: D102
        numbers = {
            path: follows.value(self.sizes)
            for (name, path), follows in self.follows.get(frame.call, {}).items()
            if name == f"#{number}"
        }
        return with_integers((args, kwargs), numbers)

    def fits(self, call: Call, source: nn.Module) -> bool:  # noqa: D102
        return not call.names or all(
            self.sizes.get((join(call.names[0], key), dim), n) == n
            for key, shape in shapes_of(source).items()
            for dim, n in enumerate(shape)
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except (RuntimeError, IndexError) as error:
            writes = getattr(func, "__name__", "") in ("copy_", "__setitem__")
            if not (writes and self.lenient):
                raise
            self._skipped.append(args[0])
            self.refusal = self.refusal or error.with_traceback(None)
            return args[0]


class _Trial(Builder, Sketch):
    """A builder whose model has shapes alone."""


@dataclass(frozen=True)
class Content:
    """A content that depends on the position along free widths.

    Attributes:
        writer: The call that wrote it last.
        line: The line that did.
        dims: The dims along which it differs.
        patched_by: The call that wrote to a part of it, if one did.

    Example:
        >>> Content(None, "net.py:3 `torch.eye(n)`", (0, 1), None).dims
        (0, 1)
    """

    writer: Call | None
    line: str
    dims: tuple[int, ...]
    patched_by: Call | None


class Replay:
    """Makes a model at other sizes.

    Args:
        recording: Its constructor calls.
        samples: Each size at the base, at two sets of multiples of the base's widths, at random
            widths, and at one multiple of all.
        repeated: The same for attributes in which torch's layers repeat their tensors' sizes.
        values: Whether the analysis makes values: some constructors read them.

    Attributes:
        torn: Arguments that several widths ask for, with what each follows for each of them.
        misfits: Attributes that follow a width otherwise than an argument gives both.
        rivals: Pairs of attributes of one module that ask one argument for different widths.
        partners: Pairs of a tensor's size and an attribute that one argument gives.
        unexplained: Tensors to which no argument gives the sizes that are wanted.
        unloaded: Lines that load weights, which networks of other widths do not take.
        partial: Whether a constructor refuses the numbers that some sizes ask for.

    Raises:
        ConstructionError: The function does not make the whole model anew each time, or a
            constructor refuses the numbers that other sizes ask for.
    """

    def __init__(
        self,
        recording: Recording,
        samples: Mapping[Where, tuple[int, ...]],
        repeated: Mapping[Where, tuple[int, ...]],
        *,
        values: bool = False,
    ) -> None:
        if not recording.complete:
            raise ConstructionError("it returns modules that it did not make")
        self.recording, self._values = recording, values
        self._base = {where: sizes[0] for where, sizes in samples.items()}
        self._free = {name for (name, _), sizes in samples.items() if len(set(sizes)) > 1}
        self._sizes = [{where: n[i] for where, n in samples.items()} for i in (1, 2, -1)]
        self.partial = False
        self.unloaded: set[str] = set()
        self.follows: Mapping[Call, Mapping[Leaf, Follows]] = {}
        self._solve(samples, repeated, ())
        self.unexplained = _names(self._mismatched(self.follows))
        if self.unexplained:
            layers = {name.rpartition(".")[0] for name in self.unexplained}
            self._solve(samples, repeated, _around(self.recording.root, layers))
            self.unexplained = _names(self._mismatched(self.follows))

    def build(
        self,
        sizes: Mapping[Where, int],
        arguments: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    ) -> nn.Module:
        """A new model of these sizes, drawn from the global random state.

        Args:
            sizes: Every size in ``samples``.
            arguments: Per layer, integer arguments that it is given instead of what they ask for.

        Raises:
            ConstructionError: A constructor refuses the numbers that they ask for.
        """
        other = any(sizes[where] != n for where, n in self._base.items())
        free = self._free if other else frozenset()
        builder = Builder(self.recording, self.follows, sizes, free, self._uncertain, arguments)
        model = self._run(builder)
        if builder.refusal is not None and self._gives(sizes):  # the class itself refuses
            raise ConstructionError(first_line(builder.refusal))
        return model

    def plain(self, sizes: Mapping[Where, int]) -> nn.Module | None:
        """A model whose outermost constructors alone are given other numbers.

        It shares no correction with :meth:`build`: the user's code made it by its own arguments.

        Returns:
            None where such arguments do not give these sizes.
        """
        builder = Builder(self.recording, self._outermost(), sizes, frozenset(), frozenset())
        builder.lenient = False
        try:
            model = self._run(builder)
        except ConstructionError:
            return None
        return model if _has_sizes(model, sizes) else None

    def _gives(self, sizes: Mapping[Where, int]) -> bool:
        """Whether arguments of the outermost constructors alone give these sizes."""
        trial = _Trial(self.recording, self._outermost(), sizes, frozenset(), frozenset())
        try:
            return _has_sizes(self._run(trial), sizes)
        except ConstructionError:
            return False

    def _outermost(self) -> dict[Call, dict[Leaf, Follows]]:
        """What the arguments of the outermost constructors follow."""
        return {
            call: {leaf: f for leaf, f in self.follows[call].items() if not leaf[0].startswith("#")}
            for call in self.recording.root.children
            if call in self.follows
        }

    def example(self, number: int = 0) -> nn.Module:
        """A model of the first two or the last sample of sizes, without the values of layers."""
        sizes = self._sizes[number]
        return self._run(_Trial(self.recording, self.follows, sizes, self._free, self._uncertain))

    def hold(self, layers: Set[str]) -> bool:
        """Give the constructors of some layers the base's numbers, where their tensors allow it."""
        held = {
            call: {
                leaf: fixed(call.numbers[leaf]) if leaf in call.numbers else follows
                for leaf, follows in leaves.items()
            }
            for call, leaves in self.follows.items()
            if not layers.isdisjoint(call.names)
        }
        follows = {**self.follows, **held}
        try:
            if not _names(self._mismatched(follows)) <= self.unexplained:
                return False
        except ConstructionError:
            return False
        self.follows = follows
        return True

    def without_torn(self) -> nn.Module | None:
        """:meth:`example` with the base's numbers in :attr:`torn`; None if it cannot be made."""
        follows = {
            call: {
                leaf: fixed(call.numbers[leaf])
                if (call, leaf[0]) in self.torn and leaf in call.numbers
                else found
                for leaf, found in leaves.items()
            }
            for call, leaves in self.follows.items()
        }
        try:
            return self._run(
                _Trial(self.recording, follows, self._sizes[0], self._free, self._uncertain)
            )
        except ConstructionError:
            return None

    def astray(self, contents: Mapping[str, Content]) -> dict[str, str]:
        """The tensors whose fixed content does not follow their sizes.

        Args:
            contents: Per tensor, a content that depends on the position along a free width.

        Returns:
            Per tensor whose size comes otherwise than by the arguments of its writer, the reason.
        """
        found: dict[str, str] = {}
        for writer in {content.patched_by for content in contents.values()}:
            own = {name: of for name, of in contents.items() if of.patched_by is writer}
            within = set(writer.walk()) - {writer} if writer else set()
            follows = {
                call: {leaf: f for leaf, f in leaves.items() if not leaf[0].startswith("#")}
                for call, leaves in self.follows.items()
                if call not in within
            }
            for name, dim in self._mismatched(follows):
                # Along a dim where it is the same everywhere, it may have got its size otherwise.
                if name in own and (dim in own[name].dims or name in self.unexplained):
                    found[name] = (
                        f"content that is written for the base's width at {own[name].line}"
                    )
        for name in self._unwritten & contents.keys():
            found[name] = f"content that fits the base's width alone at {contents[name].line}"
        return found

    def tying(self, contents: Mapping[str, Content]) -> list[tuple[Follows, Follows]]:
        """Sizes that would have to change together for arguments to give those of some contents."""

        def like(where: Where) -> tuple[int, ...]:
            return tuple(n * 2**20 // self._base[where] for n in (s[where] for s in self._sizes))

        wanted = {like((name, dim)) for name, of in contents.items() for dim in of.dims}
        return [
            (first, other)
            for (call, _), (first, *others) in self.torn.items()
            if any(call is of.writer for of in contents.values())
            for other in others
            if other.where is not None and like(other.where) in wanted
        ]

    def _solve(self, samples: Any, repeated: Any, sizing: Iterable[Call]) -> None:
        solver = Solver(self.recording, samples, repeated, sizing)
        self._run(solver)
        self.follows, self.torn, self.rivals = solver.follows, solver.torn, solver.rivals
        self.partners = solver.partners
        self.misfits = solver.misfits | {
            other.where  # those that ask for one number in all examples, by chance, show nothing
            for first, other in solver.rivals
            if all(first.value(sizes) == other.value(sizes) for sizes in self._sizes)
            and other.where is not None
        }
        self._uncertain = solver.uncertain | {call for call, _ in solver.torn}

    def _mismatched(self, follows: Mapping[Call, Mapping[Leaf, Follows]]) -> set[Where]:
        """The dims of tensors that do not get the sizes that are wanted."""
        found: set[Where] = set()
        self._unwritten: set[str] = set()
        for sizes in self._sizes[:2]:
            trial = _Trial(self.recording, follows, sizes, self._free, self._uncertain)
            try:
                model = self._run(trial)
            except ConstructionError:
                if sizes is self._sizes[0]:
                    raise
                self.partial = True
                break
            found.update(
                (name, dim)
                for name, shape in shapes_of(model).items()
                for dim, n in enumerate(shape)
                if sizes.get((name, dim), n) != n
            )
            self._unwritten |= trial.unwritten(model)
            self.unloaded |= trial.unloaded
        return found

    def _run(self, session: Session) -> nn.Module:
        with kept_generators() if isinstance(session, Sketch) else nullcontext():
            if isinstance(session, Sketch):
                session.values = self._values
            try:
                return session.run(self.recording.make_model)
            except ConstructionError:
                raise
            except Exception as error:
                raise ConstructionError(f"{type(error).__name__}: {first_line(error)}") from error


def _has_sizes(model: nn.Module, sizes: Mapping[Where, int]) -> bool:
    shapes = shapes_of(model).items()
    return all(sizes.get((name, dim)) == n for name, s in shapes for dim, n in enumerate(s))


def _names(places: Iterable[Where]) -> frozenset[str]:
    return frozenset(name for name, _ in places)


def _around(root: Call, layers: Set[str]) -> list[Call]:
    """The calls that made some layers, and the calls that those were made by."""
    found: list[Call] = []

    def visit(call: Call) -> bool:
        within = [visit(child) for child in (*call.children, *call.parts.values())]
        if any(within) or not layers.isdisjoint(call.names):
            found.append(call)
        return call in found[-1:]

    visit(root)
    return found
