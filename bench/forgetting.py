"""Forgetting: what becomes of what one generation has learned when the next is tuned on something else.

The Mini model of the tests is tuned on voices that it never heard: that is the old domain. What came out is tuned on
words and voices that are new again, with the same passes over them each time: alone; with replay of utterances of the
old domain; held by elastic weight consolidation; with both. Word error rates are of two test sets that nothing was
trained or validated on. All audio is synthesised: this shows what the machinery does, not how accurate Whisper is.
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
from attune.contract.training import Checkpointing, Distributed, Ewc, Hyperparameters, Lora, Method, Padding
from attune_trainer.data.dataset import SAMPLE_RATE
from attune_trainer.training.launch import TrainingProcesses
from attune_trainer.training.mixture import Mixture
from attune_trainer.training.settings import Keeping, TrainingSettings, TrainingUtterance

from bench.finetune_speed import measure_wer, say
from bench.report import Row, report
from tests.assets import mini_model

TARGET_RATIO: Final = 1.5
RATIO: Final = 0.25
LAMBDA: Final = "3"
SEED: Final = 7
FIRST: Final = Hyperparameters(learning_rate="3e-3", epochs=6, seed=SEED)
NEXT: Final = Hyperparameters(learning_rate="3e-3", epochs=14, seed=SEED)
SAMPLES: Final = 200
VOICES: Final = tuple(
    mini_model.Voice(f"next-{number}", voice, pitch, speed)
    for number, (voice, pitch, speed) in enumerate(
        (
            ("en-us+m1", 45, 230),
            ("en-us+f3", 65, 240),
            ("en-gb-x-rp+m2", 40, 240),
            ("en-gb-x-rp+f1", 60, 230),
            ("en-gb+m5", 55, 250),
            ("en-us+klatt5", 50, 230),
        )
    )
)
# None of them is among the 60 words that the Mini model knows.
WORDS: Final = (
    *("apple", "banana", "bread", "butter", "cheese", "coffee", "honey", "lemon", "onion", "pepper", "sugar"),
    *("bicycle", "bridge", "castle", "forest", "harbour", "island", "market", "mountain", "river", "village"),
    *("bring", "carry", "find", "send", "wash", "cold", "empty", "fresh", "heavy", "quick", "small"),
)
WAYS: Final = {
    "alone": "without replay",
    "replay": "with {ratio:.0%} replay",
    "ewc": "with elastic weight consolidation, lambda {strength}",
    "both": "with both",
}
UTTERANCES: Final = {"train": 400, "validation": 40, "test": 160}


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
        soundfile.write(file, one.audio, SAMPLE_RATE, subtype="PCM_16")
        seconds = len(one.audio) / SAMPLE_RATE
        written.append(TrainingUtterance(audio=file, text=one.text, seconds=seconds, part=part))
    train, validation = UTTERANCES["train"], UTTERANCES["validation"]
    return Domain(
        train=tuple(written[:train]),
        validation=tuple(written[train : train + validation]),
        test=tuple(written[train + validation :]),
    )


def make_domains(folder: Path) -> tuple[Domain, Domain]:
    """Speaks both domains, the new one first."""
    count = sum(UTTERANCES.values())
    new = mini_model.speak_all(make_new_sentences(count), VOICES, SEED, vary=True)
    heard = mini_model.make_sentences(mini_model.TRAINING_UTTERANCES, mini_model.SEED)
    sentences = mini_model.make_sentences(count, SEED + 3, frozenset(heard))
    old = mini_model.speak_all(sentences, mini_model.NEW_VOICES, SEED + 3, vary=False)
    return make_domain(new, folder / "new", 0), make_domain(old, folder / "old", 1)


def tune(
    base: Path,
    new: Domain,
    hyperparameters: Hyperparameters,
    folder: Path,
    *,
    mixture: Mixture | None = None,
    replayed: tuple[TrainingUtterance, ...] = (),
    keeping: Keeping | None = None,
) -> Path:
    """Tunes as a FineTune's Job does; gives the merged model."""

    def follow(event: dict[str, Any]) -> None:
        if event["kind"] == "validated":
            old = f", old {event['oldWer']:.1%}" if "oldWer" in event else ""
            say(f"{folder.name}: epoch {event['epoch']:g}, new {event['wer']:.1%}{old}")

    with TrainingProcesses(folder / "processes", 1) as processes:
        processes.begin(
            TrainingSettings(
                base=base,
                base_uri="s3://attune/models/mini",
                model_id="ft:mini:000000",
                language="en",
                train=(*new.train, *replayed),
                validation=new.validation,
                method=Method.LORA,
                lora=Lora(rank=16, alpha=32),
                hyperparameters=hyperparameters,
                padding=Padding.BUCKETS,
                early_stopping=None,
                checkpoint=Checkpointing(),
                distributed=Distributed(),
                fingerprint="bench",
                checkpoints=folder / "checkpoints",
                resume=None,
                output=folder / "output",
                stop_file=processes.stop_file,
                mixture=mixture,
                keeping=keeping,
            )
        )
        processes.follow(follow, lambda: False)
    return folder / "output" / "merged"


def main() -> None:
    """Tunes one generation, and the next in four ways, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strength", default=LAMBDA, help="lambda of elastic weight consolidation")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="attune-forgetting-"))
    try:
        compare(folder, arguments.strength)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(folder: Path, strength: str) -> None:
    """Runs all and reports."""
    mini = mini_model.ensure_mini_model()
    say("speaks both domains")
    new, old = make_domains(folder / "audio")

    def measure(model: Path) -> Outcome:
        return Outcome(new=measure_wer(model, list(new.test)), old=measure_wer(model, list(old.test)))

    first = tune(mini, old, FIRST, folder / "first")
    before = measure(first)
    say(f"before: new {before.new:.1%}, old {before.old:.1%}")
    outcomes: dict[str, Outcome] = {}
    for name in WAYS:
        replay, held = name in ("replay", "both"), name in ("ewc", "both")
        model = tune(
            first,
            new,
            NEXT,
            folder / name,
            mixture=Mixture(weights=(1.0,), replay=RATIO) if replay else None,
            replayed=old.train if replay else (),
            keeping=Keeping(
                validation=old.validation,
                ewc=Ewc(strength=strength) if held else None,
                sample=old.train[:SAMPLES] if held else (),
            ),
        )
        outcomes[name] = measure(model)
        say(f"{name}: new {outcomes[name].new:.1%}, old {outcomes[name].old:.1%}")
    write_report(before, outcomes, strength)


def write_report(before: Outcome, outcomes: dict[str, Outcome], strength: str) -> None:
    """Reports the old domain's word error rate against what it was, and all figures that this comes from."""
    ratios = {name: one.old / before.old for name, one in outcomes.items()}
    ways = {name: way.format(ratio=RATIO, strength=strength) for name, way in WAYS.items()}
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
                Row(f"old domain WER ratio {way}", ratios[name], "times what it was")
                for name, way in ways.items()
                if name != "replay"
            ),
            Row("old domain word error rate, before", 100 * before.old, "%"),
            *(Row(f"old domain word error rate, {way}", 100 * outcomes[name].old, "%") for name, way in ways.items()),
            Row("new domain word error rate, before", 100 * before.new, "%"),
            *(Row(f"new domain word error rate, {way}", 100 * outcomes[name].new, "%") for name, way in ways.items()),
        ],
    )


if __name__ == "__main__":
    main()
