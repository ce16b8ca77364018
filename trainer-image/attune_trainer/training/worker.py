"""One training process: `python -m attune_trainer.training.worker SETTINGS PIPE`, started by DeepSpeed's launcher.

Heavy libraries are imported while the Job's own process still downloads the inputs; the settings file appears when they
are there.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import deepspeed
import torch
from attune.contract.exitcode import ExitCode
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from attune_trainer.failures import InvalidInput, RecipeFailure, from_exception
from attune_trainer.logs import configure_logging
from attune_trainer.modeling.artifact import read_artifact
from attune_trainer.modeling.recognizer import Recognizer
from attune_trainer.modeling.whisper import Whisper, load_whisper
from attune_trainer.scoring.errors import ErrorCounts, count_errors, total
from attune_trainer.scoring.normaliser import normalise
from attune_trainer.training import adapters, checkpoints
from attune_trainer.training.arithmetic import wants_bf16
from attune_trainer.training.batches import Batch, plan_epoch
from attune_trainer.training.checkpoints import TrainingState
from attune_trainer.training.course import Course
from attune_trainer.training.estimate import choose_probe, extrapolate
from attune_trainer.training.events import EventWriter
from attune_trainer.training.hardware import describe_hardware, peak_memory
from attune_trainer.training.loader import BatchLoader, TrainingBatch, read_samples
from attune_trainer.training.objective import TranscriptionLoss
from attune_trainer.training.schedule import learning_rate_factor
from attune_trainer.training.selection import judge_epoch
from attune_trainer.training.settings import TrainingSettings, TrainingUtterance
from attune_trainer.training.transcripts import TranscriptEncoder

_log = logging.getLogger("attune_trainer.training")

_VALIDATION_CHUNK: Final = 16  # utterances between two looks at the stop flag
# More than this share of unusable transcripts is a mistake in the data, not a few odd lines.
_MAX_LEFT_OUT: Final = 0.1
_MERGE_TOLERANCE: Final = 2e-3  # of the logits' largest magnitude, at fp32


class _StopRequested(Exception):  # noqa: N818 (a wish, not an error)
    """The pod has been asked to end."""


class Training:
    """A run in one process: sets up once, then trains, validates, saves and finally exports."""

    def __init__(self, settings: TrainingSettings, events: EventWriter) -> None:
        self._settings = settings
        self._events = events
        self._parameters = settings.hyperparameters
        self._rank = int(os.environ.get("RANK", "0"))
        self._processes = int(os.environ.get("WORLD_SIZE", "1"))
        self._signalled = False
        self._device = torch.device(get_accelerator().current_device_name())
        self._gpus = self._processes if self._device.type == "cuda" else 0
        self._baseline_seconds = 0.0
        self._probe_began: float | None = None  # in step_seconds; None where this attempt went on from a checkpoint

    def run(self) -> None:
        """Trains from the start or from a checkpoint to the end, and writes adapter and merged model.

        Raises:
            RecipeFailure: for whatever a person has to mend.
            _StopRequested: after a checkpoint, when the pod has been asked to end.
        """
        signal.signal(signal.SIGTERM, self._on_signal)
        torch.manual_seed(self._parameters.seed)
        settings = self._settings
        self._whisper = load_whisper(settings.base, self._device)
        encoder = TranscriptEncoder(self._whisper, settings.language)
        self._train, self._encoder = self._usable(encoder), encoder
        base_artifact = read_artifact(settings.base)
        state = self._resumed_state()
        if state is None:
            if not base_artifact.language:
                base_artifact = base_artifact.model_copy(update={"language": encoder.language})
            self._tell_stage("Baseline", percent=10)
            began = time.monotonic()
            counts = self._validate(Recognizer(self._whisper, base_artifact), (10, 20))
            self._baseline_seconds = time.monotonic() - began
            wer = total(counts).rate
            state = TrainingState(
                fingerprint=settings.fingerprint,
                baseline_wer=wer,
                course=Course().with_validation(0, 0, {"wer": wer}),
                baseline_counts=tuple(one.row for one in counts),
            )
        self._tell("baseline", wer=state.baseline_wer)
        if state.estimate is not None:
            self._tell("estimate", **state.estimate.model_dump(by_alias=True))
        adapters.clean_generation(self._whisper)
        self._artifact = adapters.describe_artifact(
            self._whisper,
            settings.padding,
            base_uri=settings.base_uri,
            model_id=settings.model_id,
            language=encoder.language,
        )
        self._recognizer = Recognizer(self._whisper, self._artifact)
        self._model = adapters.attach_adapters(self._whisper, settings.lora)
        torch.manual_seed(self._parameters.seed + self._rank)  # dropout differs between processes, adapters do not
        self._plans = self._plan()
        self._total_steps = sum(len(plan) for plan in self._plans)
        self._bf16 = wants_bf16(self._parameters.precision, self._device)
        self._engine = self._build_engine()
        self._best = settings.checkpoints / "best" / checkpoints.BEST_FILE
        if settings.resume is not None:
            self._restore(settings.resume)
        hardware = describe_hardware(self._device, bf16=self._bf16, processes=self._processes)
        self._state = state.model_copy(update={"hardware": tuple(dict.fromkeys((*state.hardware, hardware)))})
        self._train_to_the_end()
        self._finish()

    def _usable(self, encoder: TranscriptEncoder) -> tuple[TrainingUtterance, ...]:
        """Keeps the utterances that model and decoder have room for."""
        window = self._whisper.window_seconds
        kept = tuple(
            one for one in self._settings.train if one.seconds <= window and encoder.encode(one.text) is not None
        )
        left_out = len(self._settings.train) - len(kept)
        if left_out > _MAX_LEFT_OUT * len(self._settings.train):
            room = self._whisper.config.max_target_positions
            message = (
                f"{left_out} of {len(self._settings.train)} training utterances are longer than the model's window of "
                f"{window:g} s or have transcripts longer than its {room} tokens; cut them into shorter utterances"
            )
            raise InvalidInput("UtterancesTooLong", message)
        if left_out:
            _log.warning("utterances left out: too long for the model", extra={"count": left_out})
        return kept

    def _plan(self) -> list[list[tuple[Batch, ...]]]:
        buckets = self._recognizer.buckets
        return [
            plan_epoch(
                [one.seconds for one in self._train],
                buckets,
                batch_size=self._parameters.batch_size,
                max_batch_seconds=self._parameters.max_batch_seconds,
                seed=self._parameters.seed,
                epoch=epoch,
                processes=self._processes,
            )
            for epoch in range(self._parameters.epochs)
        ]

    def _build_engine(self) -> Any:
        """Sets up DeepSpeed with torch's own optimiser, whose kernels are compiled already."""
        parameters = self._parameters
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=float(parameters.learning_rate), weight_decay=float(parameters.weight_decay), fused=True
        )
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's bookkeeping only: batches vary in size
            "gradient_accumulation_steps": 1,
            "gradient_clipping": float(parameters.max_grad_norm),
            "zero_optimization": {"stage": self._settings.distributed.deepspeed.zero_stage},
            "torch_autocast": {"enabled": self._bf16, "dtype": "bfloat16"},
            "steps_per_print": sys.maxsize,
        }
        _log.info("training set up", extra={"precision": "bf16" if self._bf16 else "fp32", "device": str(self._device)})
        engine, *_ = deepspeed.initialize(
            model=TranscriptionLoss(self._model, self._whisper), optimizer=optimizer, config=config
        )
        return engine

    def _train_to_the_end(self) -> None:
        while self._awaits_validation() or not self._has_ended():
            try:
                if not self._state.budget_reached:
                    self._train_epoch()
                if self._awaits_validation():
                    self._finish_epoch()
            except _StopRequested:
                self._save_checkpoint()
                raise
            # After the last epoch too: the pod may be lost while it merges or publishes.
            self._save_checkpoint()

    def _has_ended(self) -> bool:
        state = self._state
        return state.epoch >= self._parameters.epochs or state.stopped_early or state.budget_reached

    def _awaits_validation(self) -> bool:
        """Tells whether an epoch is trained and not yet validated, or a run is about to end without any validation."""
        state = self._state
        if state.best_epoch is None and state.budget_reached:
            return True
        return state.epoch < self._parameters.epochs and state.step_in_epoch == len(self._plans[state.epoch])

    def _train_epoch(self) -> None:
        """Trains to the end of the epoch, or of the budget."""
        state = self._state
        steps = self._plans[state.epoch][state.step_in_epoch :]
        loader = BatchLoader(self._whisper, self._encoder, self._train, [step[self._rank] for step in steps])
        self._tell_stage("Training", step=state.step, total_steps=self._total_steps)
        self._engine.train()
        try:
            began = time.monotonic()
            for planned, batch in zip(steps, loader, strict=True):
                loss, stop, spent = self._train_step(batch)
                now = time.monotonic()
                step_audio = sum(self._train[index].seconds for one in planned for index in one.members)
                self._advance(loss, step_audio, now - began)
                began = now
                self._estimate()
                self._report_step(loss)
                if stop:
                    raise _StopRequested
                if spent and self._state.step < self._total_steps:
                    _log.info("the budget is spent", extra={"step": self._state.step})
                    self._state = self._state.model_copy(update={"budget_reached": True})
                    break
                if self._state.step % self._settings.checkpoint.every_steps == 0:
                    self._save_checkpoint()
                    began = time.monotonic()
        finally:
            loader.close()

    def _train_step(self, batch: TrainingBatch) -> tuple[float, bool, bool]:
        """Makes one optimiser step; gives all processes' mean loss, whether to stop, whether the budget is spent."""
        step = self._state.step
        rate = float(self._parameters.learning_rate) * learning_rate_factor(
            step, self._total_steps, float(self._parameters.warmup_ratio)
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        loss = self._engine(
            batch.features.to(self._device),
            batch.tokens.inputs.to(self._device),
            batch.tokens.targets.to(self._device),
        )
        # One message for all that the processes must agree on.
        wishes = torch.tensor([self._stop_wanted(), self._budget_spent()], dtype=torch.double, device=loss.device)
        shared = torch.cat([loss.detach().double().reshape(1), wishes])
        if self._processes > 1:
            torch.distributed.all_reduce(shared)
        summed, stop, spent = shared.tolist()
        if not math.isfinite(summed):
            message = (
                f"the loss is no longer finite at step {step + 1} of {self._total_steps}; lower "
                "spec.hyperparameters.learningRate or maxGradNorm, or raise warmupRatio"
            )
            raise RecipeFailure(ExitCode.DIVERGED, "Diverged", message)
        self._engine.backward(loss)
        self._engine.step()
        return summed / self._processes, stop > 0, spent > 0

    def _advance(self, loss: float, audio_seconds: float, seconds: float) -> None:
        state = self._state
        self._state = state.model_copy(
            update={
                "step": state.step + 1,
                "step_in_epoch": state.step_in_epoch + 1,
                "audio_seconds": state.audio_seconds + audio_seconds,
                "step_seconds": state.step_seconds + seconds,
                "training_seconds": state.training_seconds + seconds,
                "course": state.course.with_loss(loss),
            }
        )

    def _estimate(self) -> None:
        """Says once what the whole run will take; a run that went on from a checkpoint has said it, or never does."""
        state = self._state
        first, last = probe = choose_probe(self._total_steps)
        if state.step == first:
            self._probe_began = state.step_seconds
        elif state.step == last and self._probe_began is not None:
            estimate = extrapolate(
                [sum(len(batch.members) * batch.bucket for batch in step) for plan in self._plans for step in plan],
                probe,
                state.step_seconds - self._probe_began,
                validations=self._parameters.epochs,
                validation_seconds=self._baseline_seconds,
                gpus=self._gpus,
                memory_bytes=peak_memory(self._device, self._processes),
            )
            self._state = state.model_copy(update={"estimate": estimate})
            self._tell("estimate", **estimate.model_dump(by_alias=True))

    def _report_step(self, loss: float) -> None:
        state = self._state
        gpu_seconds = state.training_seconds * self._gpus
        metrics = {
            "loss": loss,
            "audioSecondsPerSecond": state.audio_seconds / max(state.step_seconds, 1e-9),
            "gpuSeconds": gpu_seconds,
        }
        budget = self._settings.budget
        cost = None if budget is None else budget.cost(gpu_seconds)
        if cost is not None:
            metrics["estimatedCost"] = cost
        epoch = state.epoch + state.step_in_epoch / len(self._plans[state.epoch])
        self._tell(
            "progress",
            step=state.step,
            total_steps=self._total_steps,
            epoch=epoch,
            metrics=metrics,
            percent=20 + 70 * state.step / self._total_steps,
        )

    def _finish_epoch(self) -> None:
        """Validates as the model will be served, keeps the best adapters, and decides about stopping early."""
        state = self._state
        self._tell_stage("Validating")
        began = time.monotonic()
        done = 20 + 70 * state.step / self._total_steps
        counts = self._validate(self._recognizer, (done, done))
        metrics = {"wer": total(counts).rate}
        judged = judge_epoch(state, metrics["wer"], self._settings.early_stopping)
        epochs = self._epochs_done()
        update: dict[str, Any] = {
            "training_seconds": state.training_seconds + time.monotonic() - began,
            "course": state.course.with_validation(epochs, state.step, metrics),
            "peak_memory_bytes": max(state.peak_memory_bytes, peak_memory(self._device, self._processes)),
        }
        if judged.best_epoch == state.epoch:
            update["best_counts"] = tuple(one.row for one in counts)
            if self._rank == 0:
                adapters.save_adapter_state(adapters.adapter_state(self._model), self._best)
        self._state = judged.model_copy(update=update)
        _log.info("epoch finished", extra={"epoch": epochs, **{name: round(one, 4) for name, one in metrics.items()}})
        self._tell("validated", epoch=epochs, **metrics)

    def _epochs_done(self) -> float:
        """Gives the passes over the data that are done, with fraction."""
        left = self._state.step
        for number, plan in enumerate(self._plans):
            if left < len(plan):
                return number + left / len(plan)
            left -= len(plan)
        return float(len(self._plans))

    def _validate(self, recognizer: Recognizer, percent: tuple[float, float]) -> list[ErrorCounts]:
        """Counts word errors of each utterance of the validation split; every process transcribes its share.

        Raises:
            _StopRequested: when the pod has been asked to end.
        """
        split, language = self._settings.validation, self._settings.language
        mine = sorted(range(len(split)), key=lambda index: split[index].seconds)[self._rank :: self._processes]
        self._whisper.model.eval()
        rows: list[Sequence[int]] = [(0, 0, 0, 0)] * len(split)
        # Of the largest share, so that all processes ask each other equally often.
        share = -(-len(split) // self._processes)
        for start in range(0, share, _VALIDATION_CHUNK):
            if self._agree_to_stop():
                raise _StopRequested
            chunk = mine[start : start + _VALIDATION_CHUNK]
            texts = recognizer.transcribe([read_samples(split[index]) for index in chunk])
            for index, text in zip(chunk, texts, strict=True):
                rows[index] = count_errors(normalise(split[index].text, language), normalise(text, language)).row
            low, high = percent
            self._tell("progress", percent=low + (high - low) * (start + len(chunk)) / share)
        if self._processes > 1:
            shared = torch.tensor(rows, device=self._device)
            torch.distributed.all_reduce(shared)
            rows = shared.tolist()
        counts = [ErrorCounts.from_row(row) for row in rows]
        if not total(counts).words:
            message = "the validation split has no words to count errors on; give the Dataset more transcribed audio"
            raise InvalidInput("NoValidationWords", message)
        return counts

    def _save_checkpoint(self) -> None:
        """Writes weights, optimiser, random state, position and best adapters; complete once it is sealed."""
        state = self._state
        folder = self._settings.checkpoints / checkpoints.folder_name(state.step, state.epoch)
        random_states: list[Any] = [None] * self._processes
        mine = {"host": torch.get_rng_state()}
        if self._device.type == "cuda":
            mine["device"] = torch.cuda.get_rng_state(self._device)
        if self._processes > 1:
            torch.distributed.all_gather_object(random_states, mine)
        else:
            random_states = [mine]
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._engine.save_checkpoint(
            str(folder / checkpoints.ENGINE_FOLDER),
            tag="state",
            client_state={"random": random_states},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        if self._processes > 1:
            torch.distributed.barrier()
        if self._rank == 0:
            if self._best.is_file():
                shutil.copyfile(self._best, folder / checkpoints.BEST_FILE)
            (folder / checkpoints.STATE_FILE).write_text(state.model_dump_json(), encoding="utf-8")
            checkpoints.seal(folder)
            self._tell("checkpoint", step=state.step, folder=str(folder))

    def _resumed_state(self) -> TrainingState | None:
        if self._settings.resume is None:
            return None
        text = (self._settings.resume / checkpoints.STATE_FILE).read_bytes()
        state = TrainingState.model_validate_json(text)
        _log.info("goes on from a checkpoint", extra={"step": state.step})
        return state

    def _restore(self, folder: Path) -> None:
        path, client = self._engine.load_checkpoint(
            str(folder / checkpoints.ENGINE_FOLDER),
            tag="state",
            load_module_strict=False,
            load_lr_scheduler_states=False,
        )
        if path is None:
            raise RuntimeError("DeepSpeed did not take a checkpoint that had been verified")
        mine = client["random"][self._rank]
        torch.set_rng_state(mine["host"])
        if self._device.type == "cuda" and "device" in mine:
            torch.cuda.set_rng_state(mine["device"], self._device)
        best = folder / checkpoints.BEST_FILE
        if self._rank == 0 and best.is_file():
            self._best.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(best, self._best)

    def _finish(self) -> None:
        """Exports the best adapters, proves that the merged model computes the same, and says what came out."""
        if self._rank != 0:
            return
        self._tell_stage("Merging", percent=92)
        adapters.load_adapter_state(self._model, self._best)
        self._whisper.model.eval()
        probe = min(self._settings.validation, key=lambda one: one.seconds)
        before = self._probe(self._whisper, probe)
        _, merged = adapters.export(
            self._model, self._whisper, self._settings.output, base=self._settings.base, artifact=self._artifact
        )
        reloaded = load_whisper(merged, self._device)
        difference = float((self._probe(reloaded, probe) - before).abs().max() / before.abs().max())
        tolerance = _MERGE_TOLERANCE if reloaded_in_fp32(merged) else 10 * _MERGE_TOLERANCE
        if difference > tolerance:
            raise RuntimeError(f"the merged model differs from the adapted one by {difference:.2e} of the logits")
        state = self._state
        (self._settings.output / checkpoints.STATE_FILE).write_text(state.model_dump_json(), encoding="utf-8")
        self._tell(
            "finished",
            wer=state.best_wer,
            baseline_wer=state.baseline_wer,
            steps=state.step,
            total_steps=self._total_steps,
            epochs=self._epochs_done(),
            training_seconds=state.training_seconds,
            audio_seconds_per_second=state.audio_seconds / max(state.step_seconds, 1e-9),
            stopped_early=state.stopped_early,
            gpus=self._gpus,
        )

    @torch.inference_mode()
    def _probe(self, whisper: Whisper, utterance: TrainingUtterance) -> Tensor:
        """Gives the logits of one utterance's own transcript."""
        features = whisper.features([read_samples(utterance)], self._recognizer.buckets[-1]).to(self._device)
        tokens = self._encoder.batch([(self._encoder.encode(utterance.text) or [])[:64]])
        logits: Tensor = whisper.model(
            input_features=features, decoder_input_ids=tokens.inputs.to(self._device), use_cache=False
        ).logits
        return logits.float()

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self._signalled = True

    def _stop_wanted(self) -> bool:
        return self._signalled or self._settings.stop_file.exists()

    def _budget_spent(self) -> bool:
        budget = self._settings.budget
        return budget is not None and budget.is_spent(self._state.training_seconds, self._gpus)

    def _agree_to_stop(self) -> bool:
        """Tells every process whether any was asked to end; all of them have to call this at the same point."""
        if self._processes == 1:
            return self._stop_wanted()
        asked = torch.tensor(float(self._stop_wanted()), device=self._device)
        torch.distributed.all_reduce(asked)
        return bool(asked > 0)

    def _tell_stage(self, stage: str, **fields: Any) -> None:
        self._tell("progress", stage=stage, **fields)

    def _tell(self, kind: str, **fields: Any) -> None:
        if self._rank == 0:
            self._events.send(kind, **fields)


def reloaded_in_fp32(folder: Path) -> bool:
    """Tells whether a checkpoint was stored without rounding."""
    return '"float32"' in (folder / "config.json").read_text(encoding="utf-8")


def wait_for(file: Path, events: EventWriter) -> None:
    """Waits for the settings; ends with BrokenPipeError when the Job's process is gone."""
    while not file.exists():
        events.send("waiting")
        time.sleep(0.1)


@contextlib.contextmanager
def _distributed() -> Iterator[None]:
    # Shared-memory reductions are an extension that DeepSpeed compiles on first use; the image has no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def main(arguments: list[str]) -> int:
    """Runs one training process; gives its exit status."""
    configure_logging()
    for name in ("DeepSpeed", "deepspeed", "compilers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    settings_file, pipe = (Path(argument) for argument in arguments)
    events = EventWriter(pipe)
    try:
        wait_for(settings_file, events)
        settings = TrainingSettings.model_validate_json(settings_file.read_bytes())
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with _distributed():
            Training(settings, events).run()
    except _StopRequested:
        events.send("stopped")
        return int(ExitCode.TERMINATED)
    except BrokenPipeError:
        _log.error("the Job's process is gone; training ends")
        return int(ExitCode.INTERNAL_ERROR)
    except Exception as error:  # noqa: BLE001 (the Job's process is told of every one)
        failure = from_exception(error, "finetune")
        if failure.code is ExitCode.INTERNAL_ERROR:
            _log.exception("training failed")
        events.send_failure(failure)
        return int(failure.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
