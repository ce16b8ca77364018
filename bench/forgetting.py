"""Forgetting: what becomes of the words and voices that a model knew when it is tuned on others.

The Mini model of the tests is tuned on words that it never heard, from voices that it never heard, with the same passes
over that audio each time: alone; with replay of utterances of the old kind; held by elastic weight consolidation; with
both. Word error rates are of two test sets that nothing was trained or validated on. All audio is synthesised; this
shows what the machinery does, not how accurate Whisper is.
"""

import argparse
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import soundfile
from attune.contract.training import Checkpointing, Distributed, Ewc, Hyperparameters, Lora, Padding
from attune_trainer.training.launch import TrainingProcesses
from attune_trainer.training.mixture import Mixture
from attune_trainer.training.settings import Keeping, TrainingSettings, TrainingUtterance

from bench.finetune_speed import measure_wer, say
from bench.report import Row, report
from tests.assets import mini_model

TARGET_RATIO: Final = 1.5
RATIO: Final = 0.25
LAMBDA: Final = "100"
EPOCHS: Final = 14
SEED: Final = 7
LORA: Final = Lora(rank=16, alpha=32)
LEARNING_RATE: Final = "5e-3"
# None of them is among the 60 words that the Mini model knows.
WORDS: Final = (
    *("apple", "banana", "bread", "butter", "cheese", "coffee", "honey", "lemon", "onion", "pepper", "sugar"),
    *("bicycle", "bridge", "castle", "forest", "harbour", "island", "market", "mountain", "river", "village"),
    *("bring", "carry", "find", "send", "wash", "cold", "empty", "fresh", "heavy", "quick", "small"),
)
UTTERANCES: Final = {"train": 400, "validation": 60, "test": 150}


@dataclass(frozen=True)
class Domain:
    """Utterances of one kind, in splits that share no sentence."""

    train: tuple[TrainingUtterance, ...]
    validation: tuple[TrainingUtterance, ...]
    test: tuple[TrainingUtterance, ...]


@dataclass(frozen=True)
class Outcome:
    """Word error rates on both test sets, as fractions."""

    new: float
    old: float


def make_new_sentences(count: int) -> list[str]:
    """Draws different sentences of two to four new words."""
    generator = random.Random(SEED)  # noqa: S311 (a corpus, no secret)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(generator.choice(WORDS) for _ in range(generator.randint(2, 4)))] = None
    return list(found)


def make_domain(utterances: Sequence[mini_model.Utterance], folder: Path, part: int) -> Domain:
    """Writes the audio down and divides it."""
    folder.mkdir(parents=True)
    written = []
    for number, one in enumerate(utterances):
        file = folder / f"{number}.wav"
        soundfile.write(file, one.audio, mini_model.SAMPLE_RATE, subtype="PCM_16")
        seconds = len(one.audio) / mini_model.SAMPLE_RATE
        written.append(TrainingUtterance(audio=file, text=one.text, seconds=seconds, part=part))
    train, validation = UTTERANCES["train"], UTTERANCES["validation"]
    return Domain(
        train=tuple(written[:train]),
        validation=tuple(written[train : train + validation]),
        test=tuple(written[train + validation :]),
    )


def make_domains(folder: Path) -> tuple[Domain, Domain]:
    """Speaks both domains: the new one, and more of the old one than the model was trained on."""
    count = sum(UTTERANCES.values())
    new = mini_model.speak_all(make_new_sentences(count), mini_model.NEW_VOICES, SEED, vary=False)
    heard = mini_model.make_sentences(mini_model.TRAINING_UTTERANCES, mini_model.SEED)
    sentences = mini_model.make_sentences(count, SEED + 3, frozenset(heard))
    old = mini_model.speak_all(sentences, mini_model.OLD_VOICES, SEED + 3, vary=False)
    return make_domain(new, folder / "new", 0), make_domain(old, folder / "old", 1)


def tune(base: Path, new: Domain, old: Domain, folder: Path, *, replay: bool, strength: str | None) -> Path:
    """Tunes as a FineTune's Job does; gives the merged model."""

    def follow(event: dict[str, Any]) -> None:
        if event["kind"] == "validated":
            say(f"{folder.name}: epoch {event['epoch']}, new {event['wer']:.1%}, old {event['old_wer']:.1%}")

    with TrainingProcesses(folder / "processes", 1) as processes:
        processes.begin(
            TrainingSettings(
                base=base,
                base_uri="s3://attune/models/mini",
                model_id="ft:mini:000000",
                language="en",
                train=(*new.train, *old.train) if replay else new.train,
                validation=new.validation,
                lora=LORA,
                hyperparameters=Hyperparameters(learning_rate=LEARNING_RATE, epochs=EPOCHS, seed=SEED),
                padding=Padding.BUCKETS,
                early_stopping=None,
                checkpoint=Checkpointing(),
                distributed=Distributed(),
                fingerprint="bench",
                checkpoints=folder / "checkpoints",
                resume=None,
                output=folder / "output",
                stop_file=processes.stop_file,
                mixture=Mixture(weights=(1.0,), replay=RATIO) if replay else None,
                keeping=Keeping(
                    validation=old.validation,
                    ewc=Ewc(strength=strength) if strength is not None else None,
                    sample=old.train[:200] if strength is not None else (),
                ),
            )
        )
        processes.follow(follow, lambda: False)
    return folder / "output" / "merged"


def main() -> None:
    """Tunes four times and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strength", default=LAMBDA, help="lambda of elastic weight consolidation")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="attune-forgetting-"))
    try:
        compare(folder, arguments.strength)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(folder: Path, strength: str) -> None:
    """Runs all four and reports."""
    base = mini_model.ensure_mini_model()
    say("speaks both domains")
    new, old = make_domains(folder / "audio")

    def measure(model: Path) -> Outcome:
        return Outcome(new=measure_wer(model, list(new.test)), old=measure_wer(model, list(old.test)))

    before = measure(base)
    say(f"before: new {before.new:.1%}, old {before.old:.1%}")
    plans: dict[str, tuple[bool, str | None]] = {
        "alone": (False, None),
        "replay": (True, None),
        "ewc": (False, strength),
        "both": (True, strength),
    }
    outcomes: dict[str, Outcome] = {}
    for name, (replay, held) in plans.items():
        outcomes[name] = measure(tune(base, new, old, folder / name, replay=replay, strength=held))
        say(f"{name}: new {outcomes[name].new:.1%}, old {outcomes[name].old:.1%}")
    write_report(before, outcomes, strength)


def write_report(before: Outcome, outcomes: dict[str, Outcome], strength: str) -> None:
    """Reports the old domain's word error rate against what it was, and all figures that this comes from."""
    ratios = {name: one.old / before.old for name, one in outcomes.items()}
    ways = {
        "alone": "without replay",
        "replay": f"with {RATIO:.0%} replay",
        "ewc": f"with elastic weight consolidation, lambda {strength}",
        "both": "with both",
    }
    report(
        "forgetting",
        [
            Row(
                "old domain WER ratio with replay",
                ratios["replay"],
                "times what it was",
                f"at most {TARGET_RATIO}",
                holds=ratios["replay"] <= TARGET_RATIO,
                versus=f"{ratios['alone']:.1f} times without",
            ),
            *(
                Row(f"old domain WER ratio {ways[name]}", ratios[name], "times what it was")
                for name in ("alone", "ewc", "both")
            ),
            Row("old domain word error rate, before", 100 * before.old, "%"),
            *(Row(f"old domain word error rate, {way}", 100 * outcomes[name].old, "%") for name, way in ways.items()),
            Row("new domain word error rate, before", 100 * before.new, "%"),
            *(Row(f"new domain word error rate, {way}", 100 * outcomes[name].new, "%") for name, way in ways.items()),
        ],
    )


if __name__ == "__main__":
    main()
