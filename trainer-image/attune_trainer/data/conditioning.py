"""What Normalize and Filter do to one utterance's audio and text, once it is decoded."""

from dataclasses import dataclass

import numpy as np
from attune.contract.job import FilterRules, Normalization, PrepareRecipe
from numpy.typing import NDArray

from attune_trainer.data.dataset import SAMPLE_RATE
from attune_trainer.data.language import is_other_language
from attune_trainer.data.levels import estimate_snr, measure_level, set_loudness
from attune_trainer.data.rejections import (
    CLIPPED,
    NO_SPEECH,
    OTHER_LANGUAGE,
    SPOKEN_TOO_FAST,
    SPOKEN_TOO_SLOWLY,
    TOO_LONG,
    TOO_NOISY,
    TOO_QUIET,
    TOO_SHORT,
    RejectedLine,
)
from attune_trainer.data.voice import find_speech

# Audio that is trimmed may be longer than an utterance by this much of silence.
_SILENCE_SECONDS = 30.0


@dataclass(frozen=True)
class Conditions:
    """The Normalize and Filter steps of a recipe, their numbers read."""

    min_seconds: float
    max_seconds: float
    language: str
    normalization: Normalization
    rules: FilterRules

    @classmethod
    def of(cls, recipe: PrepareRecipe) -> "Conditions":
        """Takes them from a recipe."""
        return cls(
            min_seconds=float(recipe.min_seconds),
            max_seconds=float(recipe.max_seconds),
            language=recipe.language,
            normalization=recipe.normalization or Normalization(),
            rules=recipe.rules or FilterRules(),
        )

    @property
    def decode_seconds(self) -> float:
        """The longest audio that is worth decoding."""
        return self.max_seconds + (_SILENCE_SECONDS if self.normalization.keep_silence_seconds is not None else 0.0)

    def apply(self, samples: NDArray[np.int16], clipped: float, sentence: str) -> NDArray[np.int16]:
        """Gives an utterance's samples as they are to be stored.

        What is filtered by level, noise and clipping is the recording as it came; by duration and rate, what is left
        of it after silence was cut off.

        Args:
            samples: mono at 16 kHz, shape (samples,).
            clipped: share of them that was cut off at full scale.
            sentence: normalised text.

        Raises:
            RejectedLine: NoSpeech, TooShort, TooLong, SpokenTooSlowly, SpokenTooFast, Clipped, TooQuiet, TooNoisy,
                OtherLanguage.
        """
        audio = samples.astype(np.float32) / 32768.0
        self._check_recording(audio, clipped)
        kept = self._trim(audio)
        seconds = len(kept) / SAMPLE_RATE
        if seconds > self.max_seconds:
            raise RejectedLine(TOO_LONG)
        if seconds < self.min_seconds:
            raise RejectedLine(TOO_SHORT)
        self._check_text(sentence, seconds)
        lufs = self.normalization.loudness_lufs
        if lufs is not None:
            kept = set_loudness(kept, SAMPLE_RATE, float(lufs))
        elif len(kept) == len(samples):
            return samples
        result: NDArray[np.int16] = np.clip(np.rint(kept * 32768.0), -32768, 32767).astype(np.int16)
        return result

    def _check_recording(self, audio: NDArray[np.float32], clipped: float) -> None:
        rules = self.rules
        if rules.max_clipped_share is not None and clipped > float(rules.max_clipped_share):
            raise RejectedLine(CLIPPED)
        if rules.min_level_db is not None and measure_level(audio) < float(rules.min_level_db):
            raise RejectedLine(TOO_QUIET)
        if rules.min_snr_db is not None and estimate_snr(audio, SAMPLE_RATE) < float(rules.min_snr_db):
            raise RejectedLine(TOO_NOISY)

    def _trim(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        keep = self.normalization.keep_silence_seconds
        if keep is None:
            return audio
        speech = find_speech(audio)
        if speech is None:
            raise RejectedLine(NO_SPEECH)
        margin = round(float(keep) * SAMPLE_RATE)
        return audio[max(0, speech.first - margin) : speech.last + margin]

    def _check_text(self, sentence: str, seconds: float) -> None:
        rules = self.rules
        rate = sum(not character.isspace() for character in sentence) / seconds
        if rules.min_characters_per_second is not None and rate < float(rules.min_characters_per_second):
            raise RejectedLine(SPOKEN_TOO_SLOWLY)
        if rules.max_characters_per_second is not None and rate > float(rules.max_characters_per_second):
            raise RejectedLine(SPOKEN_TOO_FAST)
        if rules.match_language and is_other_language(sentence, self.language):
            raise RejectedLine(OTHER_LANGUAGE)
