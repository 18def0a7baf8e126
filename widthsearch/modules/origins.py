"""How the content of a model's tensors came about while its constructors ran.

A content is *random* if a random operation of torch's took part in it; any other is the same for
every seed. A content is *patched* if a fixed value was written to a part of the tensor, chosen by
index: which part it is may depend on a width. A number that is written to all of a dim, such as the
zeros of an embedding's padding row, does not depend on that dim's width.

Example:
    >>> def make() -> nn.Linear:
    ...     layer = nn.Linear(3, 4)
    ...     layer.bias.data[2:].zero_()
    ...     return layer
    >>> origins = Origins(lambda: "make")
    >>> with origins:
    ...     model = make()
    >>> weight, bias = origins.of(model.weight), origins.of(model.bias)
    >>> (weight.random, weight.patched_by), (bias.random, bias.patched_by)
    ((True, None), (True, 'make'))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from widthsearch.modules.source import is_foreign, model_line, running
from widthsearch.torch_internals import TorchDispatchMode, schema_of, storage_of, tree_leaves


@dataclass
class Origin:
    """Where a content comes from.

    Attributes:
        random: Whether a random operation took part in it.
        writer: The call that wrote it last: what ``writer`` of :class:`Origins` returned.
        line: The line that did.
        patched_by: The call that wrote a fixed value to a part of it; None if none did.
        patches: The dims of each part, by size and stride; empty for a value that is no number.

    Example:
        >>> origin = Origin(random=True, writer="Linear", line="net.py:3 `nn.Linear(3, 4)`")
        >>> origin.patched_by is None
        True
    """

    random: bool = False
    writer: Any = None
    line: str = ""
    patched_by: Any = None
    patches: set[tuple[tuple[int, int], ...]] = field(default_factory=set)

    def patched_along(self, tensor: Tensor, dims: Iterable[int]) -> Any:
        """The call that wrote a fixed value to a part of one of some dims; None if none did."""
        whole = {(tensor.shape[d], tensor.stride(d)) for d in dims}
        return None if all(whole <= set(part) for part in self.patches) else self.patched_by


class Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the origin of every tensor's content.

    Args:
        writer: Returns the constructor call that is running.
    """

    def __init__(self, writer: Callable[[], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._writer = writer
        self._of: dict[int, Origin] = {}  # by storage

    def of(self, tensor: Tensor) -> Origin:
        """The origin of a tensor's content."""
        return self._of.get(storage_of(tensor), Origin())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **kwargs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if schema_of(func).is_mutable and read:
            written = read[0] if "out" not in kwargs else kwargs["out"]
            others = [t for t in read if t is not written]
            self._write(func, written, random or any(self.of(t).random for t in others))
            return out
        known = {storage_of(t) for t in read} & self._of.keys()
        random = random or any(self.of(t).random for t in read)
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and storage_of(made) not in known:
                self._of[storage_of(made)] = Origin(random, self._writer(), model_line())
        return out

    def _write(self, func: Any, tensor: Tensor, random: bool) -> None:
        origin = self._of.setdefault(storage_of(tensor), Origin())
        origin.writer, origin.line = self._writer(), model_line()
        whole = _is_whole(tensor)
        overwritten = func.overloadpacket.__name__ in ("copy_", "fill_", "zero_")
        if whole and overwritten:
            origin.random, origin.patched_by = random, None
            origin.patches.clear()
        else:
            if not whole and not random and not _by_shape():
                origin.patched_by = origin.writer
                number = func.overloadpacket.__name__ in ("fill_", "zero_")
                part = zip(tensor.shape, tensor.stride(), strict=True) if number else ()
                origin.patches.add(tuple(part))
            origin.random = origin.random or random


def _is_whole(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _by_shape() -> bool:
    """Whether a function of ``torch.nn.init`` is filling a whole tensor (``eye_``, ``dirac_``)."""
    for frame in running():
        if frame.f_code.co_filename == nn.init.__file__:
            tensor = frame.f_locals.get("tensor")
            return isinstance(tensor, Tensor) and _is_whole(tensor)
        if not is_foreign(frame):
            break
    return False
