"""Helm, and the chart rendered by it."""

import pytest

from devcluster import binaries
from tests.chart.rendering import Helm


@pytest.fixture(scope="session")
def helm() -> Helm:
    """The development cluster's helm, provided if it is not there yet."""
    binaries.ensure(["helm"])
    return Helm(binaries.find("helm"))
