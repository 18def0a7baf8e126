"""What users may write wrongly, and the error of each: ``fixtures/refusals.yaml`` by section."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROWS = yaml.safe_load((Path(__file__).parent / "fixtures" / "refusals.yaml").read_text("utf-8"))


def refusals(section: str) -> pytest.MarkDecorator:
    """Give a test the ``values`` and the ``message`` of each refusal in a section."""
    ids = [str(values) for values, _ in ROWS[section]]
    return pytest.mark.parametrize(("values", "message"), ROWS[section], ids=ids)
