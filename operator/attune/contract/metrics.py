"""Names and labels of the Prometheus series that the scorer exports and the operator judges."""

from enum import StrEnum
from typing import Final


class Track(StrEnum):
    """An arm of a rollout."""

    STABLE = "stable"
    CANARY = "canary"


# Labels on every series of the scorer.
LABEL_NAMESPACE: Final = "attune_namespace"
LABEL_CANARY: Final = "attune_canary"
LABEL_ROLLOUT: Final = "attune_rollout"
LABEL_TRACK: Final = "track"

# Per arm. Sums run over scored utterances i with errors e_i (capped) and reference words w_i.
UTTERANCES: Final = "attune_scored_utterances_total"  # n
WORD_ERRORS: Final = "attune_word_errors_total"  # sum e
REFERENCE_WORDS: Final = "attune_reference_words_total"  # sum w
ERRORS_SQUARED: Final = "attune_word_errors_squared_total"  # sum e^2
WORDS_SQUARED: Final = "attune_reference_words_squared_total"  # sum w^2
ERRORS_TIMES_WORDS: Final = "attune_word_errors_times_words_total"  # sum e w
FAILED_REQUESTS: Final = "attune_score_failed_requests_total"

# Over pairs: golden utterances that count for both arms. What an arm never answers, asked again and again, counts as an
# empty transcript of it: all words are wrong. These feed the verdict.
PAIRED_UTTERANCES: Final = "attune_paired_utterances_total"  # n
PAIRED_WORDS: Final = "attune_paired_reference_words_total"  # sum w
PAIRED_STABLE_ERRORS: Final = "attune_paired_stable_errors_total"  # sum s
PAIRED_CANARY_ERRORS: Final = "attune_paired_canary_errors_total"  # sum c
PAIRED_STABLE_SQUARED: Final = "attune_paired_stable_errors_squared_total"  # sum s^2
PAIRED_CANARY_SQUARED: Final = "attune_paired_canary_errors_squared_total"  # sum c^2
PAIRED_PRODUCT: Final = "attune_paired_errors_product_total"  # sum s c
# Gauges: how many utterances and words the golden set holds in all; 1 when every one of them has been replayed.
GOLDEN_UTTERANCES: Final = "attune_golden_utterances"
GOLDEN_WORDS: Final = "attune_golden_words"
GOLDEN_EXHAUSTED: Final = "attune_golden_exhausted"

PAIRED_SERIES: Final = (
    PAIRED_UTTERANCES,
    PAIRED_WORDS,
    PAIRED_STABLE_ERRORS,
    PAIRED_CANARY_ERRORS,
    PAIRED_STABLE_SQUARED,
    PAIRED_CANARY_SQUARED,
    PAIRED_PRODUCT,
    GOLDEN_UTTERANCES,
    GOLDEN_WORDS,
    GOLDEN_EXHAUSTED,
)
