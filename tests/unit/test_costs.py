"""What a run may take, what it costs, and when it has paid for itself."""

import pytest
from attune.contract.costs import Budget, Economics, describe_break_even

PRICED = Budget(cost_per_gpu_hour="2.5", currency="EUR")
# 900,000 words a month: 0.2 -> 0.1 saves 90,000 corrections, 900 EUR.
ECONOMICS = Economics(cost_per_corrected_word="0.01", hours_per_month="100")


@pytest.mark.parametrize(
    ("wer", "cost", "says"),
    [
        pytest.param(0.1, 0.0, "pays back at once: it saves 900.00 EUR a month", id="a run that cost nothing"),
        pytest.param(0.1, 10.0, "pays back within a day: ", id="hours"),
        pytest.param(0.1, 300.0, "pays back in 11 days: ", id="days are rounded up"),
        pytest.param(
            0.1,
            600.0,
            "pays back in 3 weeks: it saves 900.00 EUR a month, and the run cost 600.00 EUR",
            id="weeks are rounded up",
        ),
        pytest.param(0.1, 2500.0, "pays back in 3 months: ", id="months are rounded up"),
        pytest.param(0.1, 53_000.0, "pays back in 59 months: ", id="what takes less than five years"),
        pytest.param(0.1, 55_000.0, "does not pay back within 5 years: it saves 900.00", id="what takes longer"),
        pytest.param(0.2, 1.0, "does not pay back: it leaves as many words to correct", id="a model that is no better"),
        pytest.param(0.3, 0.0, "does not pay back: ", id="a worse one, whatever it cost"),
    ],
)
def test_break_even(wer: float, cost: float, says: str) -> None:
    assert describe_break_even(ECONOMICS, PRICED, 0.2, wer, cost).startswith(says)


def test_without_a_currency_sums_have_none() -> None:
    said = describe_break_even(ECONOMICS, Budget(cost_per_gpu_hour="2.5"), 0.2, 0.1, 1234.5)
    assert said.endswith("it saves 900.00 a month, and the run cost 1,234.50")


@pytest.mark.parametrize(
    ("budget", "seconds", "gpus", "spent"),
    [
        pytest.param({"max_hours": "2"}, 7199, 8, False, id="the clock counts once, however many GPUs work"),
        pytest.param({"max_hours": "2"}, 7200, 0, True, id="the clock counts on a CPU"),
        pytest.param({"max_gpu_hours": "12"}, 5399, 8, False, id="GPU hours below the bound"),
        pytest.param({"max_gpu_hours": "12"}, 5400, 8, True, id="each GPU counts"),
        pytest.param({"max_gpu_hours": "12"}, 10**9, 0, False, id="a CPU takes no GPU hours"),
        pytest.param({"max_gpu_hours": "12", "max_hours": "1"}, 3600, 1, True, id="the first bound reached counts"),
        pytest.param({"cost_per_gpu_hour": "2.5"}, 10**9, 8, False, id="a price alone bounds nothing"),
    ],
)
def test_a_budget_is_spent(budget: dict[str, str], seconds: float, gpus: int, spent: bool) -> None:  # noqa: FBT001
    assert Budget(**budget).is_spent(seconds, gpus) is spent


def test_gpu_time_is_priced_where_there_is_a_price() -> None:
    assert PRICED.cost(7200) == 5
    assert Budget(max_hours="1").cost(7200) is None
