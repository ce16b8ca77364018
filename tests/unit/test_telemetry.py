"""What the operator says of itself before anything has happened."""

import pytest
from attune.api.canary import Outcome
from attune.telemetry import Metrics


@pytest.mark.parametrize("outcome", Outcome)
def test_the_first_rollout_to_end_is_an_increase(outcome: Outcome) -> None:
    registry = Metrics().registry
    assert registry.get_sample_value("attune_rollouts_total", {"outcome": outcome.value}) == 0
