"""What can be measured of a clip without knowing what is said in it: level, noise, loudness."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

_FRAME_SECONDS: Final = 0.02
# Power of a step of 16 bits: what is digitally silent has at least that.
_FLOOR: Final = (1.0 / 32768.0) ** 2
# ITU-R BS.1770-4: blocks of 400 ms that overlap by three quarters, gated at -70 LUFS and 10 LU below their mean.
_BLOCK_SECONDS: Final = 0.4
_STEP_SECONDS: Final = 0.1
_ABSOLUTE_GATE: Final = -70.0
_RELATIVE_GATE: Final = -10.0
_OFFSET: Final = -0.691
_PEAK: Final = 10 ** (-1.0 / 20.0)

_Samples = NDArray[np.float32]


def measure_level(samples: _Samples) -> float:
    """Gives the RMS level in dB of full scale: a sine of full scale -> -3.01."""
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + _FLOOR))


def estimate_snr(samples: _Samples, rate: int) -> float:
    """Estimates the signal-to-noise ratio in dB, from the loudest and the quietest tenth of frames of 20 ms.

    It takes the quietest tenth for noise alone, as pauses between and inside words are. Speech without a pause is
    estimated too low; the ratio is that of loud speech, some 5 dB above that of all of it.
    """
    frame = int(_FRAME_SECONDS * rate)
    count = len(samples) // frame
    if count == 0:
        return 0.0
    powers = np.sort(np.mean(np.square(samples[: count * frame].reshape(count, frame), dtype=np.float64), axis=1))
    tenth = max(1, count // 10)
    noise = float(np.mean(powers[:tenth])) + _FLOOR
    loud = float(np.mean(powers[-tenth:])) + _FLOOR
    return float(10 * np.log10(max(loud - noise, _FLOOR) / noise))


def measure_loudness(samples: _Samples, rate: int) -> float:
    """Gives the integrated loudness of a mono clip in LUFS (ITU-R BS.1770-4); -inf where all of it is gated out.

    A sine of 997 Hz and full scale -> -3.01. A clip of less than 400 ms is one block.
    """
    weighted = np.square(_weight(samples, rate))
    block = min(int(_BLOCK_SECONDS * rate), len(samples))
    if block == 0:
        return float("-inf")
    sums = np.concatenate(([0.0], np.cumsum(weighted)))
    starts = np.arange(0, len(samples) - block + 1, int(_STEP_SECONDS * rate))
    powers = np.maximum(sums[starts + block] - sums[starts], 0.0) / block
    kept = powers[_to_lufs(powers) > _ABSOLUTE_GATE]
    if len(kept) == 0:
        return float("-inf")
    kept = kept[_to_lufs(kept) > float(_to_lufs(np.mean(kept))) + _RELATIVE_GATE]
    return float(_to_lufs(np.mean(kept)))


def set_loudness(samples: _Samples, rate: int, lufs: float) -> _Samples:
    """Amplifies a mono clip to a loudness, less where its peak would exceed -1 dB of full scale."""
    loudness = measure_loudness(samples, rate)
    peak = float(np.max(np.abs(samples), initial=0.0))
    if not np.isfinite(loudness) or peak == 0.0:
        return samples
    gain = 10 ** ((lufs - loudness) / 20)
    return (samples * min(gain, _PEAK / peak)).astype(np.float32)


def _to_lufs(power: NDArray[np.float64] | float) -> NDArray[np.float64]:
    levels: NDArray[np.float64] = _OFFSET + 10 * np.log10(np.maximum(power, 1e-20))
    return levels


def _weight(samples: _Samples, rate: int) -> NDArray[np.float64]:
    """Applies the K-weighting, as two second-order filters for this rate, by way of their frequency responses."""
    # The filters have all but died away after half a second, which keeps the transform's end off its beginning.
    size = 1 << int(len(samples) + rate // 2).bit_length()
    unit = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    response = np.ones(size // 2 + 1, dtype=np.complex128)
    for above, below in (_shelf(rate), _high_pass(rate)):
        response *= np.polyval(above[::-1], unit) / np.polyval(below[::-1], unit)
    return np.asarray(np.fft.irfft(np.fft.rfft(samples, size) * response, size)[: len(samples)])


def _shelf(rate: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The head's effect: a shelf of 4 dB above 1.7 kHz; (numerator, denominator) in powers of a delay.

    The analogue prototype is that of BS.1770's coefficients at 48 kHz, after B. De Man, "Evaluation of implementations
    of the EBU R128 loudness measurement" (AES 2018).
    """
    frequency, gain, quality = 1681.974450955533, 3.999843853973347, 0.7071752369554196
    k = np.tan(np.pi * frequency / rate)
    high = 10 ** (gain / 20)
    band = high**0.4996667741545416
    above = np.array([high + band * k / quality + k * k, 2 * (k * k - high), high - band * k / quality + k * k])
    below = np.array([1 + k / quality + k * k, 2 * (k * k - 1), 1 - k / quality + k * k])
    return above, below


def _high_pass(rate: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The low end's: a high-pass at 38 Hz; (numerator, denominator) in powers of a delay."""
    frequency, quality = 38.13547087602444, 0.5003270373238773
    k = np.tan(np.pi * frequency / rate)
    norm = 1 + k / quality + k * k
    return np.array([1.0, -2.0, 1.0]), np.array([1.0, 2 * (k * k - 1) / norm, (1 - k / quality + k * k) / norm])
