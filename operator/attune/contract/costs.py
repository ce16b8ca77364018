"""What a run may take, what it costs, and when it has paid for itself."""

import math
from typing import Annotated, Final

from pydantic import Field

from attune.contract.base import ContractModel, DecimalString, between

_DAYS_A_MONTH: Final = 365.25 / 12
_LONGEST_YEARS: Final = 5  # what takes longer is not paid back: the next model comes first


class Budget(ContractModel):
    """Ends a run at the best checkpoint so far; what earlier attempts took counts."""

    max_gpu_hours: Annotated[DecimalString, between("0.000001", "1000000")] | None = Field(
        default=None,
        description="GPU hours of training and of the validations after its epochs; never reached on a CPU.",
    )
    max_hours: Annotated[DecimalString, between("0.000001", "100000")] | None = Field(
        default=None, description="Hours of the same by the clock."
    )
    cost_per_gpu_hour: Annotated[DecimalString, between("0", "1000000")] | None = Field(
        default=None, description="Price of a GPU hour: progress, usage and report then name costs."
    )
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$", max_length=3)] | None = Field(
        default=None, description="Currency of all prices, such as EUR."
    )

    def limits(self) -> dict[str, str]:
        """Gives what can end a run; prices cannot."""
        return self.model_dump(mode="json", by_alias=True, include={"max_gpu_hours", "max_hours"}, exclude_none=True)

    def is_spent(self, seconds: float, gpus: int) -> bool:
        """Tells whether so many seconds of training on so many GPUs are all that it allows."""
        hours = seconds / 3600
        return (self.max_hours is not None and hours >= float(self.max_hours)) or (
            self.max_gpu_hours is not None and hours * gpus >= float(self.max_gpu_hours)
        )

    def cost(self, gpu_seconds: float) -> float | None:
        """Prices GPU time; None where no price is given."""
        return None if self.cost_per_gpu_hour is None else gpu_seconds / 3600 * float(self.cost_per_gpu_hour)

    def amount(self, value: float) -> str:
        """Writes a sum of money: 1234.5 -> "1,234.50 EUR"."""
        return f"{value:,.2f} {self.currency}" if self.currency else f"{value:,.2f}"


class Economics(ContractModel):
    """What a misheard word costs, and how many words are spoken."""

    cost_per_corrected_word: Annotated[DecimalString, between("0.000001", "1000")] = Field(
        description="What it costs to have one word error corrected."
    )
    hours_per_month: Annotated[DecimalString, between("0.01", "100000000")] = Field(
        description="Hours of speech that the model is to transcribe in a month."
    )
    words_per_hour: int = Field(default=9000, ge=1, le=100000, description="Words in an hour of speech.")

    def saved_per_month(self, baseline_wer: float, wer: float) -> float:
        """Prices the corrections that the tuned model saves in a month; negative where it hears worse.

        0.2 -> 0.1 over 100 h of 9000 words at 0.01 -> 900.
        """
        words = float(self.hours_per_month) * self.words_per_hour
        return (baseline_wer - wer) * words * float(self.cost_per_corrected_word)


def describe_break_even(economics: Economics, budget: Budget, baseline_wer: float, wer: float, cost: float) -> str:
    """Says when a run has paid for itself, rounded up: "pays back in 3 weeks: it saves 900.00 EUR a month, ...".

    Args:
        economics: prices and amount of speech.
        budget: names the currency.
        baseline_wer: of the base model, as a fraction.
        wer: of the tuned model, as a fraction.
        cost: of the run.
    """
    saved = economics.saved_per_month(baseline_wer, wer)
    if saved <= 0:
        return "does not pay back: it leaves as many words to correct as the base model, or more"
    figures = f"it saves {budget.amount(saved)} a month, and the run cost {budget.amount(cost)}"
    days = cost / saved * _DAYS_A_MONTH
    if days > _LONGEST_YEARS * 12 * _DAYS_A_MONTH:
        return f"does not pay back within {_LONGEST_YEARS} years: {figures}"
    return f"pays back {_describe_days(days)}: {figures}"


def _describe_days(days: float) -> str:
    """0 -> "at once"; 0.5 -> "within a day"; 15 -> "in 3 weeks"; 100 -> "in 4 months"."""
    if days <= 1:
        return "within a day" if days > 0 else "at once"
    for unit, length, most in (("days", 1.0, 13), ("weeks", 7.0, 8)):
        count = math.ceil(days / length)
        if count <= most:
            return f"in {count} {unit}"
    return f"in {math.ceil(days / _DAYS_A_MONTH)} months"
