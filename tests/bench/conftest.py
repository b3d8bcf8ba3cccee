"""Tests of benchmarks write results from a checkout that is being worked on."""

import pytest

from lorakit.bench import result


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    """Every change counts as committed."""
    monkeypatch.setattr(result, "uncommitted", list)
