"""Length buckets: to which durations audio is padded when it is not padded to the model's whole window."""

from collections.abc import Sequence
from typing import Final

# Dense where telephone prompts and voice commands are: a clip of 1.0 s costs a twentieth of a 30 s window.
BUCKETS: Final = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 20.0, 24.0, 30.0)
# A clip that ends at the last frame gives the decoder no silence to end the sentence on.
MIN_TAIL_SECONDS: Final = 0.5


def fit_buckets(buckets: Sequence[float], window_seconds: float) -> tuple[float, ...]:
    """Keeps the buckets below a model's window, and adds the window itself as the last one.

    fit_buckets((1.5, 3, 30), 10) -> (1.5, 3, 10).
    """
    return (*sorted(bucket for bucket in buckets if bucket < window_seconds), window_seconds)


def choose_bucket(seconds: float, buckets: Sequence[float], tail_seconds: float = MIN_TAIL_SECONDS) -> float:
    """Gives the shortest bucket that holds a clip and its tail; the longest one where none does.

    choose_bucket(1.2, (1.5, 2, 30)) -> 2, because 1.2 s and 0.5 s of tail are more than 1.5 s.

    Args:
        seconds: duration of the clip.
        buckets: durations in seconds, ascending.
        tail_seconds: silence that must follow the clip.
    """
    wanted = seconds + tail_seconds
    return next((bucket for bucket in buckets if bucket >= wanted), buckets[-1])


def next_bucket(bucket: float, buckets: Sequence[float]) -> float:
    """Gives the bucket after this one; the last one is followed by itself."""
    return next((candidate for candidate in buckets if candidate > bucket), bucket)
