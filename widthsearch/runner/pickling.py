"""Pickling of spaces, proposers, trainers and data for the workers."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import cloudpickle
from torch import Tensor

from widthsearch.errors import SpaceError, one_line


@dataclass(frozen=True)
class SharedData:
    """Any object in two parts: its arrays, which processes can share, and the rest.

    Ray keeps numpy arrays in memory that all processes of a machine map, so an object that is
    loaded there has no copies of its arrays and CPU tensors.

    Attributes:
        pickled: The object without its arrays.
        buffers: The memory of its arrays.

    Example:
        >>> images, labels = np.zeros((8, 3)), torch.arange(8)
        >>> shared = SharedData.of((images, labels), "data 'mine'")
        >>> [buffer.nbytes for buffer in shared.buffers], len(shared.pickled) < 1000
        ([192, 64], True)
        >>> shared.load()[1]
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """

    pickled: bytes
    buffers: list[NDArray[np.uint8]]

    @classmethod
    def of(cls, value: object, name: str) -> SharedData:
        """Take an object apart; arrays are not copied.

        Args:
            value: The object.
            name: Its name in an error.

        Raises:
            SpaceError: It cannot be pickled.
        """
        found: list[pickle.PickleBuffer] = []
        pickled = pickle_by_value(value, name, found.append)
        buffers = [np.frombuffer(buffer.raw(), np.uint8) for buffer in found]
        for buffer in buffers:
            buffer.flags.writeable = False  # as Ray's are
        return cls(pickled, buffers)

    def load(self) -> Any:
        """Put the object together; its arrays and CPU tensors are in the buffers' memory."""
        return pickle.loads(self.pickled, buffers=self.buffers)


class _Pickler(cloudpickle.Pickler):
    """Pickles the content of a CPU tensor as an array, which can be in a buffer of its own.

    And the mark of a dataclass's field without a default by its name: fields know it by identity.
    """

    def reducer_override(self, obj: Any) -> Any:
        if obj is dataclasses.MISSING:
            return "MISSING"
        plain = type(obj) is Tensor and obj.layout is torch.strided and obj.device.type == "cpu"
        if not plain or obj.requires_grad or obj.is_quantized:
            return super().reducer_override(obj)  # type: ignore[no-untyped-call]
        array = obj.contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (array, obj.dtype, tuple(obj.shape))


def _tensor(array: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():  # a shared array is read-only
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(dtype).view(shape)


def pickle_by_value(
    value: object,
    name: str,
    on_buffer: Callable[[pickle.PickleBuffer], object] | None = None,
) -> bytes:
    """Pickle an object together with the code of the user's own modules.

    A worker may be unable to import those: a file outside its path, or on another machine.
    Installed packages are pickled by name, as usual.

    Args:
        value: A space, a request to a proposer, a trainer or data.
        name: The name of the value in an error.
        on_buffer: Called with the memory of each array, which is then not in the result.

    Raises:
        SpaceError: The value cannot be pickled.
    """
    installed = {Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}
    installed |= {Path(folder) for folder in sys.path if any(Path(folder).glob("*.dist-info"))}
    folders = tuple(f"{folder}{os.sep}" for folder in installed)  # a process has 3,000 modules
    own = []
    for key, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or key.partition(".")[0] in ("__main__", "widthsearch"):
            continue
        # cloudpickle refuses a module under an alias; it is listed under its own name as well.
        if key == module.__name__ and not str(Path(file)).startswith(folders):
            own.append(module)
    for module in own:
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    dumped = io.BytesIO()
    try:
        _Pickler(dumped, 5, on_buffer).dump(value)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise SpaceError(f"{name} cannot be sent to the workers: {one_line(error)}") from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]
    return dumped.getvalue()
