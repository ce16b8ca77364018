"""Word errors: normalised, counted, and with the interval that the data allow."""

from attune_trainer.scoring.bootstrap import BootstrapInterval, bootstrap_change, bootstrap_wer
from attune_trainer.scoring.errors import ErrorCounts, count_characters, count_errors
from attune_trainer.scoring.normaliser import NORMALISER, normalise

__all__ = [
    "NORMALISER",
    "BootstrapInterval",
    "ErrorCounts",
    "bootstrap_change",
    "bootstrap_wer",
    "count_characters",
    "count_errors",
    "normalise",
]
