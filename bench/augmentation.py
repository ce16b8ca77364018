"""What each augmentation is worth: one table of word error rates, everything else equal.

Mini is tuned on the training part of twelve new voices, as recorded, once for each row: without augmentation, with each
effect alone, and with all. Each model then hears the holdout's voices, which none of them has heard, twice: as
recorded, and through rooms, noise from 10 to 20 dB and codecs, drawn once from another seed. One seed of training, some
five hundred words: differences of two or three points are chance. Mini spells 60 words of synthesised speech, so the
table shows that an effect acts and where, not what it brings on a large model and real calls.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import soundfile
from attune.contract.job import Split
from attune.contract.training import Augmentation, Hyperparameters, Lora
from attune_trainer.augmentation.augmenter import Augmenter
from attune_trainer.data.splitting import SplitItem, divide
from attune_trainer.training.settings import TrainingUtterance

from bench.finetune_speed import SEED, Splits, measure_wer, say, tune_with_attune
from bench.report import Row, report
from tests.assets.mini_model import ensure_mini_corpus, ensure_mini_model, read_corpus

RATE = 16000
EPOCHS = 8
QUICK_EPOCHS = 1

EFFECTS: dict[str, dict[str, Any]] = {
    "speed": {"speed": {}},
    "room": {"roomImpulseResponse": {}},
    "noise": {"noise": {"kinds": ["White", "Pink", "Brown", "Babble"]}},
    "codec": {"codec": {}},
    "specAugment": {"specAugment": {}},
}
ROWS: dict[str, dict[str, Any] | None] = {
    "none": None,
    **EFFECTS,
    "all": {name: value for effect in EFFECTS.values() for name, value in effect.items()},
}
HARD = {
    "roomImpulseResponse": {"probability": "1"},
    "noise": {"snrDbMin": 10, "snrDbMax": 20, "kinds": ["White", "Pink", "Brown", "Babble"], "probability": "1"},
    "codec": {"probability": "1"},
}


def divide_voices(folder: Path) -> Splits:
    """Writes the corpus of new voices and divides it by speaker."""
    utterances = read_corpus(ensure_mini_corpus("new-voices"))
    items = [SplitItem(one.speaker, one.text) for one in utterances]
    division = divide(items, {Split.VALIDATION: 0.1, Split.HOLDOUT: 0.3}, SEED)
    splits: Splits = {split: [] for split in Split}
    folder.mkdir()
    for number, (one, split) in enumerate(zip(utterances, division.splits, strict=True)):
        if split is None:
            continue
        file = folder / f"{number}.flac"
        soundfile.write(file, one.audio, RATE)
        splits[split].append(TrainingUtterance(audio=file, text=one.text, seconds=len(one.audio) / RATE))
    return splits


def make_hard(holdout: list[TrainingUtterance], folder: Path) -> list[TrainingUtterance]:
    """Writes the holdout as it sounds through rooms, noise and codecs."""
    clips = [soundfile.read(one.audio, dtype="float32")[0] for one in holdout]
    augmenter = Augmenter(
        Augmentation.model_validate(HARD),
        [one.seconds for one in holdout],
        lambda position: clips[position],
        seed=SEED + 1,
        epoch=0,
        window_seconds=30.0,
    )
    folder.mkdir()
    hard = []
    for position, (one, clip) in enumerate(zip(holdout, clips, strict=True)):
        file = folder / f"{position}.wav"
        soundfile.write(file, augmenter.hear(position, clip), RATE, subtype="FLOAT")
        hard.append(one.model_copy(update={"audio": file}))
    return hard


def main() -> None:
    """Tunes once for each row and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch, only none and all, nothing written down")
    quick = parser.parse_args().quick
    folder = Path(tempfile.mkdtemp(prefix="attune-augmentation-"))
    try:
        rows = compare(folder, quick=quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report("augmentation", rows, keep=not quick)


def compare(folder: Path, *, quick: bool) -> list[Row]:
    """Gives the table's rows."""
    base, splits = ensure_mini_model(), divide_voices(folder / "audio")
    holdout = splits[Split.HOLDOUT]
    hard = make_hard(holdout, folder / "hard")
    epochs = QUICK_EPOCHS if quick else EPOCHS
    parameters = Hyperparameters(learning_rate="3e-3", epochs=epochs, batch_size=16, seed=SEED)
    words = sum(len(one.text.split()) for one in holdout)
    say(f"{len(splits[Split.TRAIN])} training utterances, {len(holdout)} of the holdout with {words} words")
    models = {"untuned": base}
    for name in ("none", "all") if quick else ROWS:
        say(f"tunes: {name}")
        wanted = ROWS[name]
        models[name], _ = tune_with_attune(
            base,
            splits,
            folder / name,
            epochs,
            lora=Lora(rank=8, alpha=16),
            hyperparameters=parameters,
            augmentation=None if wanted is None else Augmentation.model_validate(wanted),
        )
    say("all transcribe the holdout")
    unit, beside = "%", f"{words} words, {epochs} epochs"
    return [
        Row(f"word error rate {how}: {name}", round(100 * measure_wer(model, heard), 1), unit, versus=beside)
        for how, heard in (("as recorded", holdout), ("through rooms, noise and codecs", hard))
        for name, model in models.items()
    ]


if __name__ == "__main__":
    main()
