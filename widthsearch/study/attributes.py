"""JSON values of any length as attributes of an Optuna study or trial.

Optuna keeps an attribute as JSON in one column, which holds 64 KiB on MySQL (TEXT); the record of
a DenseNet's space has 82 kB. So the JSON text of a longer value is stored in parts. A value of
70,000 characters under ``spaces`` becomes::

    spaces#a0    the first 28,000 characters
    spaces#a1    the next 28,000
    spaces#a2    the rest
    spaces       {"widthsearch.parts": ["a", 3]}, the head

The next long value goes to ``spaces#b0`` and so on: to the generation, ``a`` or ``b``, that the
head does not name. The head is written last. So at any moment it names parts that are whole, and a
kill between two parts leaves the value before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

PART = 28_000
"""Characters of a part. As a JSON string they take up to twice as many bytes, for quotes and
backslashes are escaped; all are ASCII."""

_HEAD = "widthsearch.parts"


def write(
    key: str, value: Any, stored: Callable[[], Mapping[str, Any]], store: Callable[[str, Any], None]
) -> None:
    """Store a value, in parts where it is long.

    Args:
        key: Its key.
        value: A JSON value.
        stored: Reads all attributes; called for a long value only.
        store: Stores one attribute.

    Example:
        >>> attributes = {}
        >>> write("key", "x" * 100_000, lambda: attributes, attributes.__setitem__)
        >>> attributes["key"], len(attributes)
        ({'widthsearch.parts': ['a', 4]}, 5)
        >>> read("key", attributes) == "x" * 100_000
        True
    """
    text = json.dumps(value)
    if len(text) <= 2 * PART:
        store(key, value)
        return
    head = stored().get(key)
    taken = head[_HEAD][0] if isinstance(head, dict) and _HEAD in head else None
    generation = "b" if taken == "a" else "a"
    parts = [text[start : start + PART] for start in range(0, len(text), PART)]
    for i, part in enumerate(parts):
        store(f"{key}#{generation}{i}", part)
    store(key, {_HEAD: [generation, len(parts)]})


def read(key: str, stored: Mapping[str, Any]) -> Any:
    """The value under a key; None where there is none.

    Args:
        key: The key.
        stored: All attributes, as of one moment.
    """
    value = stored.get(key)
    if not (isinstance(value, dict) and _HEAD in value):
        return value
    generation, count = value[_HEAD]
    return json.loads("".join(stored[f"{key}#{generation}{i}"] for i in range(count)))
