"""Pickling of spaces and proposers for the workers."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from ray import cloudpickle

from widthsearch.errors import SpaceError, one_line


def pickle_by_value(value: object, name: str) -> bytes:
    """Pickle an object together with the code of the user's own modules.

    A worker may be unable to import those: a file outside its path, or on another machine.
    Installed packages are pickled by name, as usual.

    Args:
        value: A space, or a request to a proposer.
        name: The name of the value in an error.

    Raises:
        SpaceError: The value cannot be pickled.
    """
    installed = {Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}
    installed |= {Path(folder) for folder in sys.path if any(Path(folder).glob("*.dist-info"))}
    own = []
    for key, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or key.partition(".")[0] in ("__main__", "widthsearch"):
            continue
        # cloudpickle refuses a module under an alias; it is listed under its own name as well.
        if key == module.__name__ and not any(map(Path(file).is_relative_to, installed)):
            own.append(module)
    for module in own:
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    try:
        dumped: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise SpaceError(f"{name} cannot be sent to the workers: {one_line(error)}") from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]
    return dumped
