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
    >>> recorder = Recorder()
    >>> base = recorder.run(Scaled)
    >>> samples = {("layer.weight", 0): (16, 5, 9), ("layer.bias", 0): (16, 5, 9)}
    >>> replay = Replay(Scaled, recorder)
    >>> replay.solve(samples, {})
    >>> replay.build({where: 4 for where in samples}).scale
    0.5
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from widthsearch.modules.arguments import bound, integers, with_integers
from widthsearch.modules.construction import Call, DivergedError, Frame, Recorder, Session
from widthsearch.modules.initialisation import kept_generators
from widthsearch.modules.solving import (
    Follows,
    Leaf,
    Sketch,
    Solver,
    Where,
    flags_of,
    members_of,
    shapes_of,
)
from widthsearch.modules.tree import join


class ConstructionError(Exception):
    """A constructor cannot be called with the numbers that some sizes ask for."""


class Builder(Session):
    """Runs the function with the numbers that certain sizes ask for.

    A constructor that would make other modules at these numbers than at the base's (a shortcut
    where two widths differ) is given the base's for some of them, since the trace holds for the
    base's modules.

    Args:
        root: The recorded calls, as the solver left them.
        classes: The classes that were constructed.
        follows: What each number follows.
        sizes: The sizes that are wanted.
    """

    def __init__(
        self,
        root: Call,
        classes: Iterable[type],
        follows: Mapping[Call, Mapping[Leaf, Follows]],
        sizes: Mapping[Where, int],
    ) -> None:
        super().__init__(root, classes)
        self.follows, self.sizes = follows, sizes
        self.kept: list[tuple[Call, list[Leaf]]] = []
        self.skipped: list[str] = []

    def construct(self, frame: Frame, original: Any, args: Any, kwargs: Any) -> None:  # noqa: D102
        call, arguments = frame.call, bound(original, args, kwargs)
        given = dict(list(arguments.arguments.items())[1:])
        numbers = {
            (name, path): v for name, value in given.items() for path, v in integers(value)
        }
        follows = self.follows.get(call, {})
        numbers.update({leaf: follows[leaf].value(self.sizes) for leaf in follows if leaf in numbers})
        moved = [leaf for leaf, v in numbers.items() if call.numbers.get(leaf, v) != v]
        single = [leaf for leaf in moved if leaf in follows or not leaf[1]]
        state = torch.get_rng_state() if moved else None
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
            else:
                if kept:
                    self.kept.append((call, kept))
                return
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
            if getattr(func, "__name__", "") not in ("copy_", "__setitem__"):
                raise
            self.skipped.append(str(error))
            return args[0]


class _Trial(Builder, Sketch):
    """A builder whose model has shapes alone."""


class Replay:
    """Makes a model at other sizes.

    Args:
        make_model: The function that makes it.
        recorder: What recorded its calls.
    """

    def __init__(self, make_model: Callable[[], nn.Module], recorder: Recorder) -> None:
        self.make_model = make_model
        self.root, self.classes = recorder.root, recorder.classes
        self.follows: dict[Call, dict[Leaf, Follows]] = {}
        self.torn: dict[tuple[Call, str], list[Where]] = {}
        self.unexplained: frozenset[str] = frozenset()

    def solve(
        self,
        samples: Mapping[Where, tuple[int, ...]],
        repeated: Mapping[Where, tuple[int, ...]],
    ) -> None:
        """Find what the numbers in the calls follow.

        Args:
            samples: Each size at the base, and at some random widths.
            repeated: The same for attributes in which torch's layers repeat their tensors' sizes.

        Raises:
            ConstructionError: The function does not make the same model twice, or its constructors
                cannot be called at such sizes.
        """
        self._solve(samples, repeated, ())
        wrong = self._wrong(samples)
        if wrong:
            layers = {name.rpartition(".")[0] for name in wrong}
            self._solve(samples, repeated, self._around(layers))
            wrong = self._wrong(samples)
        self.unexplained = frozenset(wrong)

    def _solve(self, samples: Any, repeated: Any, sizing: Iterable[Call]) -> None:
        solver = Solver(self.root, self.classes, samples, repeated, sizing)
        with kept_generators():
            try:
                solver.run(self.make_model)
            except Exception as error:
                raise ConstructionError(f"{type(error).__name__}: {error}") from error
        self.follows, self.torn = solver.follows, solver.torn

    def _wrong(self, samples: Mapping[Where, tuple[int, ...]]) -> set[str]:
        """The tensors that do not get the size that is wanted."""
        wrong: set[str] = set()
        for number in (1, 2):
            sizes = {where: values[number] for where, values in samples.items()}
            trial = _Trial(self.root, self.classes, self.follows, sizes)
            with kept_generators():
                try:
                    model = trial.run(self.make_model)
                except Exception as error:
                    raise ConstructionError(f"{type(error).__name__}: {error}") from error
            self.trial = trial
            for name, shape in shapes_of(model).items():
                if any(sizes.get((name, dim), n) != n for dim, n in enumerate(shape)):
                    wrong.add(name)
        return wrong

    def _around(self, layers: set[str]) -> list[Call]:
        """The calls that made some layers, and those that these were made by."""
        found = []

        def visit(call: Call) -> bool:
            within = [visit(child) for child in call.children]
            if any(within) or not layers.isdisjoint(call.names):
                found.append(call)
                return True
            return False

        visit(self.root)
        return found

    def build(self, sizes: Mapping[Where, int]) -> nn.Module:
        """A new model of these sizes, drawn from the global random state.

        Raises:
            ConstructionError: A constructor refuses the numbers that they ask for.
        """
        builder = Builder(self.root, self.classes, self.follows, sizes)
        try:
            return builder.run(self.make_model)
        except DivergedError as error:
            raise ConstructionError(str(error)) from error
