"""YAML from anyone: plain values only, of bounded extent, and no key twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from widthsearch.errors import StudyError, first_line

MOST_VALUES = 10_000
"""The most values of a document, where an alias counts as often as it is used."""

LARGEST = 2**64
"""The bound of whole numbers: those of a study are below 2^63, and Python prints no huge ones."""


def load_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: One line: it is not YAML, has a tag other than YAML's own, a key twice, a number
            that is too large, bytes, or too many values, say by aliases of aliases.

    Example:
        >>> load_yaml("{epochs: 3, lr: 0.1}")
        {'epochs': 3, 'lr': 0.1}
        >>> load_yaml("[6e5, 1e-3]")  # numbers, as in YAML 1.2; PyYAML reads texts
        [600000.0, 0.001]
        >>> load_yaml("{epochs: 3, epochs: 4}")
        Traceback (most recent call last):
        ValueError: key 'epochs' is given twice (line 1, column 13)
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem}{place}") from None
    except Exception as error:  # a date, depth; PyYAML raises any type for a value that no tag fits
        raise ValueError(first_line(error)) from error
    _check_extent(value)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a study file.

    Raises:
        StudyError: It is not there, or is no mapping in safe YAML.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StudyError(f"the study file {str(path)!r} cannot be read: {reason}") from None
    except ValueError as error:
        raise StudyError(f"{path} is not safe YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise StudyError(f"{path} must be a mapping of keys to values, such as `name: mine`")
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which alone keeps the last of two equal keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes the texts that :class:`_Loader` reads as numbers."""


_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
"""Numbers with an exponent: YAML 1.1, which PyYAML follows, wants a point and a sign in them."""

for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def dump_yaml(value: Any) -> str:
    """A YAML document that :func:`load_yaml` reads back, mappings in their own order.

    Example:
        >>> print(dump_yaml({"name": "1e3", "lr": 1e-3}), end="")
        name: '1e3'
        lr: 0.001
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _check_extent(value: Any) -> None:
    """Refuse what could not be printed or walked through; a list within itself has no end."""
    left, count = [value], 0
    while left:
        inner = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"it must have at most {MOST_VALUES:,} values, aliases expanded")
        if isinstance(inner, int) and abs(inner) > LARGEST:
            raise ValueError("whole numbers must be at most 2^64, but one is larger")
        if isinstance(inner, bytes):  # JSON, in which studies are stored, has none
            raise ValueError("values must be texts, numbers and the like, but one is binary")
        if isinstance(inner, Mapping):
            left += [*inner.keys(), *inner.values()]
        elif isinstance(inner, list | tuple | set):
            left += inner
