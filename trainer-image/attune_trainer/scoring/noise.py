"""How noisy a recording is, from its loud and its quiet moments."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

_FRAME_SECONDS: Final = 0.025
# Digital silence has no power; no line is this quiet (-100 dB of full scale).
_QUIETEST: Final = 1e-10
_LOUD, _QUIET = 0.95, 0.10


def estimate_noise_ratio(samples: NDArray[np.float32], sample_rate: int) -> float:
    """Estimates the signal-to-noise ratio in dB: the power of loud frames over that of the quiet ones.

    Speech pauses; what is heard in the tenth of all frames that is quietest is taken for the noise, and subtracted from
    the loudest twentieth. A clip without a pause seems noisier than it is. Between 0 and 100 dB.

    Args:
        samples: mono, shape (samples,).
        sample_rate: in Hz.
    """
    frame = max(1, round(_FRAME_SECONDS * sample_rate))
    count = len(samples) // frame
    if count == 0:
        return 0.0
    frames = samples[: count * frame].astype(np.float64).reshape(count, frame)
    power = np.maximum((frames**2).mean(axis=1), _QUIETEST)
    loud, quiet = np.quantile(power, [_LOUD, _QUIET])
    return float(min(100.0, 10.0 * math.log10(max(1.0, (loud - quiet) / quiet))))
