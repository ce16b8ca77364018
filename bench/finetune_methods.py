"""What each way of training costs and gives: the same prompts, base model and epochs for all, one after the other.

Processor time is that of the training process between its first step and the last validation, for a second of unpadded
audio: unlike a clock it does not see who else uses the machine. Memory is the most that the process had resident by
then, imports and the base model included. Word error rate is the holdout's, each model in buckets as it is served.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attune.contract.job import Split
from attune.contract.training import Lora, LoraVariant, Method

from bench.finetune_speed import LORA, load_example, measure_wer, prepare_splits, say, tune_with_attune
from bench.report import Row, report

WORKER = "attune_trainer.training.worker"
RUNS: dict[str, tuple[Method, Lora, float]] = {
    "Lora": (Method.LORA, LORA, 1e-3),
    "Lora, q_proj and v_proj alone": (
        Method.LORA,
        LORA.model_copy(update={"target_modules": ["q_proj", "v_proj"]}),
        1e-3,
    ),
    "Lora, Dora": (Method.LORA, LORA.model_copy(update={"variant": LoraVariant.DORA}), 1e-3),
    "QLora": (Method.QLORA, LORA, 1e-3),
    "Full": (Method.FULL, LORA, 5e-5),
}


@dataclass
class Meter:
    """Reads processor time and memory of the training process when it says that training begins and ends."""

    folder: Path  # of the run, to tell its process from others
    began: float | None = None
    seconds: float = 0.0
    mebibytes: float = 0.0

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes one event."""
        if event.get("stage") == "Training" and self.began is None:
            self.began = processor_seconds(find_worker(self.folder))
        elif event.get("stage") == "Merging" and self.began is not None:
            process = find_worker(self.folder)
            self.seconds = processor_seconds(process) - self.began
            status = (process / "status").read_text(encoding="utf-8")
            self.mebibytes = int(status.partition("VmHWM:")[2].split()[0]) / 1024


def find_worker(folder: Path) -> Path:
    """Gives the folder in /proc of the process that trains in a folder."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # processes come and go
            command = file.read_bytes().decode(errors="replace").split("\0")
            if WORKER in command and "deepspeed.launcher.launch" not in command and str(folder) in " ".join(command):
                return file.parent
    raise RuntimeError("no training process runs")


def processor_seconds(process: Path) -> float:
    """Gives the time that a process has spent computing (proc_pid_stat(5), fields 14 and 15)."""
    fields = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Tunes with every method and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    epochs = parser.parse_args().epochs
    folder = Path(tempfile.mkdtemp(prefix="attune-finetune-methods-"))
    try:
        prompts, base = load_example("make_data").ensure_data(), load_example("get_model").ensure_model()
        splits = prepare_splits(prompts, folder / "audio")
        audio = epochs * sum(one.seconds for one in splits[Split.TRAIN])
        rows = []
        for name, (method, lora, rate) in RUNS.items():
            say(f"{name} tunes")
            meter = Meter(folder / name)
            model, _ = tune_with_attune(
                base,
                splits,
                folder / name,
                epochs,
                method=method,
                lora=lora,
                learning_rate=rate,
                on_event=meter.on_event,
            )
            wer = measure_wer(model, splits[Split.HOLDOUT])
            rows += [
                Row(f"{name}: holdout word error rate", 100 * wer, "%", versus=f"learning rate {rate:g}"),
                Row(f"{name}: processor time", meter.seconds / audio, "s per second of audio"),
                Row(f"{name}: memory", meter.mebibytes, "MiB"),
            ]
        report("finetune-methods", rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
