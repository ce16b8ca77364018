"""Transcripts that a recogniser hears altogether otherwise: most of them belong to other audio."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from attune.contract.job import Contradiction

from attune_trainer.data.dataset import Utterance, read_audio
from attune_trainer.job import RecipeContext
from attune_trainer.scoring.errors import count_errors
from attune_trainer.scoring.normaliser import normalise
from attune_trainer.store import fetch_model

_CHUNK: Final = 64


def find_contradicted(
    rule: Contradiction,
    utterances: Sequence[Utterance],
    language: str,
    context: RecipeContext,
    on_heard: Callable[[int], None],
) -> Iterator[int]:
    """Yields the indexes of utterances whose transcript has a word error rate above the rule's.

    What the model hears is kept nowhere.

    Args:
        rule: the model, and the highest word error rate that is kept.
        utterances: in the store already.
        language: of the transcripts.
        context: where the model and the audio are put.
        on_heard: told how many utterances have been heard, after each chunk.

    Raises:
        RecipeFailure: about a model that cannot be fetched or loaded, and the store's.
    """
    from attune_trainer.modeling import load_recognizer  # noqa: PLC0415 (without this rule, preparation needs no torch)

    folder = fetch_model(context.store, rule.model.uri, context.directory("model"), rule.model.digest)
    recognizer = load_recognizer(folder)
    limit = float(rule.max_word_error_rate)
    audio = context.directory("audio")
    # Clips of like length together: a batch is as long as its longest.
    order = sorted(range(len(utterances)), key=lambda index: (utterances[index].seconds, utterances[index].id))
    for start in range(0, len(order), _CHUNK):
        context.raise_if_stopped()
        chunk = order[start : start + _CHUNK]
        clips = [read_audio(context.store, utterances[index], audio) for index in chunk]
        heard = recognizer.transcribe(clips, language=language.partition("-")[0])
        for index, text in zip(chunk, heard, strict=True):
            errors = count_errors(normalise(utterances[index].text, language), normalise(text, language))
            if errors.rate > limit:
                yield index
        on_heard(start + len(chunk))
