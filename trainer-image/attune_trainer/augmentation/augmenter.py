"""What is done to which utterance in an epoch: drawn from the seed, the epoch and the utterance's position alone.

Neither the order in which utterances are loaded nor the process or thread that loads them changes a draw, and each
effect draws from a stream of its own, so that turning one on leaves the others as they were.
"""

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Final

import numpy as np
import soundfile
from attune.contract.training import Augmentation, NoiseKind
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray

from attune_trainer.augmentation import effects
from attune_trainer.augmentation.effects import SAMPLE_RATE, Audio

# Fewer are not a babble but a conversation; more are noise that White and Pink make for less.
TALKERS: Final = (3, 6)
_DIRECT_DB: Final = (0.0, 12.0)  # from a seat at the back to a headset
_HOP_SAMPLES: Final = SAMPLE_RATE // 100
_SPEED, _ROOM, _NOISE, _CODEC, _MASK = range(5)  # streams


class Augmenter:
    """What an epoch does to its utterances.

    Attributes:
        seconds: duration of each utterance as it is heard in this epoch; batches are planned from these.
    """

    def __init__(
        self,
        wanted: Augmentation,
        seconds: Sequence[float],
        read: Callable[[int], Audio],
        *,
        seed: int,
        epoch: int,
        window_seconds: float,
        noises: Sequence[Path] = (),
        rooms: Sequence[Path] = (),
    ) -> None:
        """Draws the speed of every utterance; everything else is drawn when an utterance is heard.

        Args:
            wanted: what is to be done.
            seconds: duration of each utterance as it was recorded.
            read: gives the samples of the utterance at a position; babble is made of them.
            seed: of everything that is drawn here.
            epoch: number of the epoch, from 0.
            window_seconds: what the model takes in one pass; nothing is slowed beyond it.
            noises: own recordings of noise, at 16 kHz.
            rooms: own impulse responses, at 16 kHz.
        """
        self._wanted = wanted
        self._read = read
        self._seed = seed
        self._epoch = epoch
        self._noises = noises
        self._rooms = rooms
        self._factors = self._draw_factors(np.asarray(seconds, dtype=np.float64), window_seconds)
        self.seconds: list[float] = (np.asarray(seconds) / self._factors).tolist()

    def hear(self, position: int, samples: Audio) -> Audio:
        """Gives the samples of an utterance as they are heard in this epoch."""
        wanted = self._wanted
        samples = effects.change_speed(samples, float(self._factors[position]))
        if wanted.room_impulse_response is not None:
            draw = self._draw(_ROOM, position)
            if draw.random() < float(wanted.room_impulse_response.probability):
                samples = effects.reverberate(samples, self._draw_room(wanted.room_impulse_response.rt60_seconds, draw))
        if wanted.noise is not None:
            draw = self._draw(_NOISE, position)
            if draw.random() < float(wanted.noise.probability):
                snr_db = draw.uniform(wanted.noise.snr_db_min, wanted.noise.snr_db_max)
                noise = self._draw_noise(wanted.noise.kinds, position, len(samples), draw)
                samples = effects.mix(samples, noise, snr_db)
        if wanted.codec is not None:
            draw = self._draw(_CODEC, position)
            if draw.random() < float(wanted.codec.probability):
                kind = wanted.codec.kinds[draw.integers(len(wanted.codec.kinds))]
                samples = effects.pass_codec(samples, kind, draw.uniform(*effects.OPUS_KBPS))
        return samples

    def mask(self, position: int, features: Audio, samples: int) -> Audio:
        """Gives the log-mel features of an utterance as they are seen in this epoch.

        Args:
            position: of the utterance.
            features: shape (mels, frames).
            samples: length of the utterance that they were made of, without padding.
        """
        if self._wanted.spec_augment is None:
            return features
        frames = min(features.shape[1], ceil(samples / _HOP_SAMPLES))
        return effects.mask_features(features, frames, self._wanted.spec_augment, self._draw(_MASK, position))

    def _draw(self, stream: int, *position: int) -> Generator:
        return default_rng(SeedSequence(self._seed, spawn_key=(self._epoch, stream, *position)))

    def _draw_factors(self, seconds: NDArray[np.float64], window_seconds: float) -> NDArray[np.float64]:
        """Draws speeds for all utterances at once; one that fills the model's window is not slowed out of it."""
        wanted = self._wanted.speed
        if wanted is None:
            return np.ones(len(seconds))
        draw = self._draw(_SPEED)
        chosen = draw.random(len(seconds)) < float(wanted.probability)
        factors = draw.uniform(float(wanted.min), float(wanted.max), len(seconds))
        return np.where(chosen, np.maximum(factors, seconds / window_seconds), 1.0)

    def _draw_room(self, rt60_seconds: tuple[float, float], draw: Generator) -> Audio:
        if self._rooms:
            response: Audio = soundfile.read(self._rooms[int(draw.integers(len(self._rooms)))], dtype="float32")[0]
            return response
        return effects.simulate_room(draw.uniform(*rt60_seconds), draw.uniform(*_DIRECT_DB), draw)

    def _draw_noise(self, kinds: Sequence[NoiseKind], position: int, length: int, draw: Generator) -> Audio:
        chosen = int(draw.integers(len(kinds) + bool(self._noises)))
        if chosen == len(kinds):
            return _read_excerpt(self._noises[int(draw.integers(len(self._noises)))], length, draw)
        if kinds[chosen] is not NoiseKind.BABBLE:
            return effects.make_noise(kinds[chosen], length, draw)
        others = len(self.seconds) - 1
        talkers = draw.choice(others, min(others, int(draw.integers(TALKERS[0], TALKERS[1] + 1))), replace=False)
        # The utterance itself is not among its background.
        return effects.make_babble([self._read(one + (one >= position)) for one in talkers.tolist()], length, draw)


def _read_excerpt(file: Path, length: int, draw: Generator) -> Audio:
    """Reads a stretch of a recording, over again where the recording is shorter."""
    with soundfile.SoundFile(file) as recording:
        recording.seek(int(draw.integers(max(1, recording.frames - length + 1))))
        return np.resize(recording.read(length, dtype="float32"), length)
