"""Fine-tuning speed beside the usual recipe: transformers' Seq2SeqTrainer and peft, every clip padded to 30 s.

Both tune whisper-tiny.en on the same telephone prompts with the same adapters, learning rate and number of epochs, one
after the other, on all cores, in the same precision: bf16 where the machine computes in it, otherwise fp32. Speed is
seconds of unpadded audio per second of training: the loop alone, without loading, validation or export; the usual
recipe's features are made before its clock starts, Attune's while it runs. Word error rate is the holdout's, each model
as it is served: the usual one padded to 30 s, Attune's in length buckets.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import soundfile
from attune.contract.job import Split
from attune.contract.training import Checkpointing, Distributed, Hyperparameters, Lora, Method, Padding, Precision
from attune_trainer.data.audio import decode_audio
from attune_trainer.data.splitting import SplitItem, divide
from attune_trainer.scoring.errors import count_errors, total
from attune_trainer.scoring.normaliser import normalise
from attune_trainer.training.launch import TrainingProcesses
from attune_trainer.training.settings import TrainingSettings, TrainingUtterance

from bench.report import Row, report

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "telephone-prompts"
TARGET_TIMES = 5.0
LORA = Lora(rank=16, alpha=32)
LEARNING_RATE = 1e-3
WARMUP_RATIO = 0.1
WEIGHT_DECAY = 0.01
SEED = 7
USUAL_BATCH = 8  # as many optimiser steps in an epoch as Attune makes, so that neither learns less for want of steps
USUAL_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

Splits = dict[Split, list[TrainingUtterance]]


def load_example(name: str) -> Any:
    """Imports a script of the example, whose folder's name is no package's."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLE))


def prepare_splits(prompts: Path, folder: Path) -> Splits:
    """Decodes the prompts to 16 kHz and divides them as the example's Dataset does."""
    entries = [json.loads(line) for line in (prompts / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()]
    items = [SplitItem(entry["group"], normalise(entry["text"], "en")) for entry in entries]
    division = divide(items, {Split.VALIDATION: 0.1, Split.HOLDOUT: 0.3}, SEED)
    splits: Splits = {split: [] for split in Split}
    folder.mkdir(parents=True, exist_ok=True)
    for number, (entry, split) in enumerate(zip(entries, division.splits, strict=True)):
        if split is None:
            continue
        samples = decode_audio(prompts / entry["audio"], 16000, 0.1, 30.0)
        file = folder / f"{number}.flac"
        soundfile.write(file, samples, 16000, subtype="PCM_16")
        splits[split].append(TrainingUtterance(audio=file, text=entry["text"], seconds=len(samples) / 16000))
    return splits


def tune_with_attune(base: Path, splits: Splits, folder: Path, epochs: int, **changes: Any) -> tuple[Path, float]:
    """Tunes as a FineTune's Job does, with changes of its settings; gives the merged model and its speed.

    Speed is audio-seconds per second.
    """
    outcome: dict[str, Any] = {}

    def follow(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event.get("epoch") is not None and event["step"] % 10 == 0:
            say(f"Attune: step {event['step']} of {event['total_steps']}, loss {event['metrics']['loss']:.2f}")
        elif event["kind"] == "finished":
            outcome.update(event)

    with TrainingProcesses(folder / "processes", 1) as processes:
        settings = TrainingSettings(
            base=base,
            base_uri="s3://attune/models/whisper-tiny.en",
            model_id="ft:whisper-tiny.en:000000",
            language="en",
            train=tuple(splits[Split.TRAIN]),
            validation=tuple(splits[Split.VALIDATION]),
            method=Method.LORA,
            lora=LORA,
            hyperparameters=Hyperparameters(
                learning_rate=str(LEARNING_RATE),
                epochs=epochs,
                weight_decay=str(WEIGHT_DECAY),
                warmup_ratio=str(WARMUP_RATIO),
                seed=SEED,
                precision=Precision.AUTO,
            ),
            padding=Padding.BUCKETS,
            early_stopping=None,
            checkpoint=Checkpointing(),
            distributed=Distributed(),
            fingerprint="bench",
            checkpoints=folder / "checkpoints",
            resume=None,
            output=folder / "output",
            stop_file=processes.stop_file,
        )
        processes.begin(settings.model_copy(update=changes))
        processes.follow(follow, lambda: False)
    return folder / "output" / "merged", float(outcome["audio_seconds_per_second"])


def tune_as_usual(base: Path, train: list[TrainingUtterance], folder: Path, epochs: int) -> None:
    """Tunes with Seq2SeqTrainer; writes the merged model and usual.json. Runs in a process of its own."""
    # Imported here: only this process needs them.
    import torch  # noqa: PLC0415
    from attune_trainer.training.arithmetic import choose_dtype  # noqa: PLC0415
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoTokenizer as Tokenizer  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    torch.manual_seed(SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = choose_dtype(Precision.AUTO, device) is torch.bfloat16  # as Attune's own processes decide
    extractor = WhisperFeatureExtractor.from_pretrained(base)
    tokenizer = Tokenizer.from_pretrained(base)
    network = WhisperForConditionalGeneration.from_pretrained(base, attn_implementation="sdpa")
    # The model itself puts the start token before the labels.
    no_timestamps = network.generation_config.no_timestamps_token_id
    examples = []
    for utterance in train:
        samples, rate = soundfile.read(utterance.audio, dtype="float32")
        ids = tokenizer(utterance.text, add_special_tokens=False).input_ids
        examples.append(
            {
                "input_features": extractor(samples, sampling_rate=rate, return_tensors="pt").input_features[0],
                "labels": torch.tensor([no_timestamps, *ids, network.config.eos_token_id]),
            }
        )

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        labels = [example["labels"] for example in batch]
        return {
            "input_features": torch.stack([example["input_features"] for example in batch]),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    model = get_peft_model(
        network, LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=USUAL_LAYERS, bias="none")
    )
    steps = -(-len(examples) // USUAL_BATCH) * epochs
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=USUAL_BATCH,
        num_train_epochs=epochs,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=round(WARMUP_RATIO * steps),
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=1.0,
        seed=SEED,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    seconds = trainer.train().metrics["train_runtime"]
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    extractor.save_pretrained(folder / "merged")
    speed = epochs * sum(utterance.seconds for utterance in train) / seconds
    outcome = {"speed": speed, "precision": "bf16" if bf16 else "fp32"}
    (folder / "usual.json").write_text(json.dumps(outcome), encoding="utf-8")


def measure_wer(model: Path, holdout: list[TrainingUtterance]) -> float:
    """Gives the holdout's corpus word error rate, as a fraction, of a model as it is served."""
    from attune_trainer.modeling import load_recognizer  # noqa: PLC0415 (torch stays out of the timed processes' parent)

    recognizer = load_recognizer(model)
    texts = recognizer.transcribe([soundfile.read(one.audio, dtype="float32")[0] for one in holdout])
    counts = (
        count_errors(normalise(one.text, "en"), normalise(text, "en")) for one, text in zip(holdout, texts, strict=True)
    )
    return total(counts).rate


def say(text: str) -> None:
    """Prints a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run_usual(arguments: argparse.Namespace) -> None:
    """Runs the usual recipe on a list of utterances that another process has written."""
    listed = json.loads((arguments.folder / "train.json").read_text(encoding="utf-8"))
    train = [TrainingUtterance.model_validate(one) for one in listed]
    tune_as_usual(arguments.base, train, arguments.folder, arguments.epochs)


def main() -> None:
    """Tunes twice and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--usual", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.usual:
        run_usual(arguments)
        return
    folder = Path(tempfile.mkdtemp(prefix="attune-finetune-speed-"))
    try:
        compare(folder, arguments.epochs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def compare(folder: Path, epochs: int) -> None:
    """Runs both recipes and reports."""
    prompts, base = load_example("make_data").ensure_data(), load_example("get_model").ensure_model()
    splits = prepare_splits(prompts, folder / "audio")
    train, holdout = splits[Split.TRAIN], splits[Split.HOLDOUT]
    audio = sum(one.seconds for one in train)
    say(f"{len(train)} training utterances, {audio / 60:.1f} minutes, {audio / len(train):.1f} s on average")

    say("Attune tunes")
    ours, our_speed = tune_with_attune(base, splits, folder / "attune", epochs)
    say("the usual recipe tunes")
    usual = folder / "usual"
    usual.mkdir()
    (usual / "train.json").write_text(json.dumps([one.model_dump(mode="json") for one in train]), encoding="utf-8")
    subprocess.run(
        [
            *(sys.executable, "-m", "bench.finetune_speed", "--usual", f"--base={base}", f"--folder={usual}"),
            f"--epochs={epochs}",
        ],
        check=True,
    )
    outcome = json.loads((usual / "usual.json").read_text(encoding="utf-8"))
    usual_speed = float(outcome["speed"])
    say("both transcribe the holdout")
    our_wer, usual_wer = measure_wer(ours, holdout), measure_wer(usual / "merged", holdout)

    times = our_speed / usual_speed
    beside = (
        f"Seq2SeqTrainer + peft, padded to 30 s, {epochs} epochs each, both in {outcome['precision']}, "
        f"clips of {audio / len(train):.1f} s"
    )
    unit = "audio-seconds per second"
    report(
        "finetune-speed",
        [
            Row(
                "fine-tuning", times, "times the usual recipe", "at least 5", holds=times >= TARGET_TIMES, versus=beside
            ),
            Row("fine-tuning, Attune", our_speed, unit),
            Row("fine-tuning, usual recipe", usual_speed, unit),
            Row(
                "holdout word error rate, Attune",
                100 * our_wer,
                "%",
                "at most the usual recipe's",
                holds=our_wer <= usual_wer,
                versus=f"{100 * usual_wer:.1f} %, the usual recipe's",
            ),
        ],
    )


if __name__ == "__main__":
    main()
