"""One training process: `python -m attune_trainer.training.worker SETTINGS PIPE`, started by DeepSpeed's launcher.

Heavy libraries are imported while the Job's own process still downloads the inputs; the settings file appears when they
are there.
"""

import contextlib
import json
import logging
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
from attune_trainer.training.checkpoints import TrainingState, Validation
from attune_trainer.training.consolidation import Consolidation, Importance
from attune_trainer.training.events import EventWriter
from attune_trainer.training.loader import BatchLoader, TrainingBatch, read_samples
from attune_trainer.training.mixture import choose_utterances
from attune_trainer.training.objective import TranscriptionLoss
from attune_trainer.training.schedule import learning_rate_factor
from attune_trainer.training.selection import judge_epoch
from attune_trainer.training.settings import CURVE_FILE, TrainingSettings, TrainingUtterance
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
        self._train, self._encoder = self._usable(encoder, settings.train), encoder
        base_artifact = read_artifact(settings.base)
        state = self._resumed_state()
        if state is None:
            if not base_artifact.language:
                base_artifact = base_artifact.model_copy(update={"language": encoder.language})
            self._tell_stage("Baseline", percent=10)
            metrics = self._measure(Recognizer(self._whisper, base_artifact), (10, 20))
            state = TrainingState(
                fingerprint=settings.fingerprint,
                baseline_wer=metrics["wer"],
                validations=(Validation(epoch=0, metrics=metrics),),
            )
        self._tell("baseline", **{"wer": state.baseline_wer, **_metrics_after(state, 0)})
        adapters.clean_generation(self._whisper)
        self._artifact = adapters.describe_artifact(
            self._whisper,
            settings.padding,
            base_uri=settings.base_uri,
            model_id=settings.model_id,
            language=encoder.language,
            history=settings.history,
        )
        self._recognizer = Recognizer(self._whisper, self._artifact)
        self._model = adapters.attach_adapters(self._whisper, settings.lora)
        torch.manual_seed(self._parameters.seed + self._rank)  # dropout differs between processes, adapters do not
        self._plans = self._plan()
        self._total_steps = sum(len(plan) for plan in self._plans)
        self._consolidation = self._estimate_importance()
        self._engine = self._build_engine()
        self._best = settings.checkpoints / "best" / checkpoints.BEST_FILE
        if settings.resume is not None:
            self._restore(settings.resume)
        self._state = state
        self._train_to_the_end()
        self._finish()

    def _usable(
        self, encoder: TranscriptEncoder, utterances: Sequence[TrainingUtterance]
    ) -> tuple[TrainingUtterance, ...]:
        """Keeps the utterances that model and decoder have room for."""
        window = self._whisper.window_seconds
        kept = tuple(one for one in utterances if one.seconds <= window and encoder.encode(one.text) is not None)
        left_out = len(utterances) - len(kept)
        if left_out > _MAX_LEFT_OUT * len(utterances):
            room = self._whisper.config.max_target_positions
            message = (
                f"{left_out} of {len(utterances)} training utterances are longer than the model's window of "
                f"{window:g} s or have transcripts longer than its {room} tokens; cut them into shorter utterances"
            )
            raise InvalidInput("UtterancesTooLong", message)
        if left_out:
            _log.warning("utterances left out: too long for the model", extra={"count": left_out})
        return kept

    def _plan(self) -> list[list[tuple[Batch, ...]]]:
        seconds, mixture = [one.seconds for one in self._train], self._settings.mixture
        parts = [one.part for one in self._train]
        return [
            self._plan_epoch(
                seconds,
                epoch,
                choose_utterances(seconds, parts, mixture, seed=self._parameters.seed, epoch=epoch)
                if mixture is not None
                else None,
            )
            for epoch in range(self._parameters.epochs)
        ]

    def _plan_epoch(
        self, seconds: Sequence[float], epoch: int, chosen: Sequence[int] | None = None
    ) -> list[tuple[Batch, ...]]:
        return plan_epoch(
            seconds,
            self._recognizer.buckets,
            batch_size=self._parameters.batch_size,
            max_batch_seconds=self._parameters.max_batch_seconds,
            seed=self._parameters.seed,
            epoch=epoch,
            processes=self._processes,
            chosen=chosen,
        )

    def _estimate_importance(self) -> Consolidation | None:
        """Finds out what the old domain depends on; None where no weights are to be held.

        It is not part of a checkpoint: the model is the base still, nothing is drawn, and so a run that resumes finds
        the same.

        Raises:
            _StopRequested: when the pod has been asked to end.
        """
        keeping = self._settings.keeping
        if keeping is None or keeping.ewc is None:
            return None
        self._tell_stage("Consolidating", percent=20)
        self._model.eval()
        sample = self._usable(self._encoder, keeping.sample)
        steps = self._plan_epoch([one.seconds for one in sample], 0)
        loader = BatchLoader(self._whisper, self._encoder, sample, [step[self._rank] for step in steps])
        importance, objective = Importance(self._model), TranscriptionLoss(self._model, self._whisper)
        try:
            for number, batch in enumerate(loader):
                if self._agree_to_stop():
                    raise _StopRequested
                self._tell("progress", step=number, total_steps=len(steps))
                importance.add(objective, *(one.to(self._device) for one in batch.tensors))
        finally:
            loader.close()
        if self._processes > 1:
            importance.share()
        return importance.consolidate(float(keeping.ewc.strength))

    def _build_engine(self) -> Any:
        """Sets up DeepSpeed with torch's own optimiser, whose kernels are compiled already."""
        parameters = self._parameters
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=float(parameters.learning_rate), weight_decay=float(parameters.weight_decay), fused=True
        )
        bf16 = wants_bf16(parameters.precision, self._device)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's bookkeeping only: batches vary in size
            "gradient_accumulation_steps": 1,
            "gradient_clipping": float(parameters.max_grad_norm),
            "zero_optimization": {"stage": self._settings.distributed.deepspeed.zero_stage},
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
            "steps_per_print": sys.maxsize,
        }
        _log.info("training set up", extra={"precision": "bf16" if bf16 else "fp32", "device": str(self._device)})
        engine, *_ = deepspeed.initialize(
            model=TranscriptionLoss(self._model, self._whisper, self._consolidation), optimizer=optimizer, config=config
        )
        return engine

    def _train_to_the_end(self) -> None:
        while self._state.epoch < self._parameters.epochs and not self._state.stopped_early:
            try:
                self._train_epoch()
                self._finish_epoch()
            except _StopRequested:
                self._save_checkpoint()
                raise
            # After the last epoch too: the pod may be lost while it merges or publishes.
            self._save_checkpoint()

    def _train_epoch(self) -> None:
        state = self._state
        steps = self._plans[state.epoch][state.step_in_epoch :]
        loader = BatchLoader(self._whisper, self._encoder, self._train, [step[self._rank] for step in steps])
        self._tell_stage("Training", step=state.step, total_steps=self._total_steps)
        self._engine.train()
        try:
            began = time.monotonic()
            for planned, batch in zip(steps, loader, strict=True):
                loss, stop = self._train_step(batch)
                now = time.monotonic()
                step_audio = sum(self._train[index].seconds for one in planned for index in one.members)
                self._advance(step_audio, now - began)
                began = now
                self._report_step(loss)
                if stop:
                    raise _StopRequested
                if self._state.step % self._settings.checkpoint.every_steps == 0:
                    self._save_checkpoint()
                    began = time.monotonic()
        finally:
            loader.close()

    def _train_step(self, batch: TrainingBatch) -> tuple[float, bool]:
        """Makes one optimiser step; gives the mean loss of all processes, and whether the run is to end."""
        step = self._state.step
        rate = float(self._parameters.learning_rate) * learning_rate_factor(
            step, self._total_steps, float(self._parameters.warmup_ratio)
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        loss = self._engine(*(one.to(self._device) for one in batch.tensors))
        # One message for all that the processes must agree on.
        shared = torch.stack([loss.detach().double(), torch.tensor(float(self._stop_wanted()), device=loss.device)])
        if self._processes > 1:
            torch.distributed.all_reduce(shared)
        mean, stop = float(shared[0]) / self._processes, bool(shared[1] > 0)
        if not torch.isfinite(shared[0]):
            message = (
                f"the loss is no longer finite at step {step + 1} of {self._total_steps}; lower "
                "spec.hyperparameters.learningRate or maxGradNorm, or raise warmupRatio"
            )
            raise RecipeFailure(ExitCode.DIVERGED, "Diverged", message)
        self._engine.backward(loss)
        self._engine.step()
        return mean, stop

    def _advance(self, audio_seconds: float, seconds: float) -> None:
        state = self._state
        self._state = state.model_copy(
            update={
                "step": state.step + 1,
                "step_in_epoch": state.step_in_epoch + 1,
                "audio_seconds": state.audio_seconds + audio_seconds,
                "step_seconds": state.step_seconds + seconds,
                "training_seconds": state.training_seconds + seconds,
            }
        )

    def _report_step(self, loss: float) -> None:
        state = self._state
        metrics = {"loss": loss, "audioSecondsPerSecond": state.audio_seconds / max(state.step_seconds, 1e-9)}
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
        metrics = self._measure(self._recognizer, (done, done))
        judged = judge_epoch(state, metrics["wer"], self._settings.early_stopping)
        seconds = state.training_seconds + time.monotonic() - began
        validations = (*state.validations, Validation(epoch=judged.epoch, metrics=metrics))
        self._state = judged.model_copy(update={"training_seconds": seconds, "validations": validations})
        if judged.best_epoch == state.epoch and self._rank == 0:
            adapters.save_adapter_state(adapters.adapter_state(self._model), self._best)
        _log.info("epoch finished", extra={"epoch": judged.epoch, "wer": round(metrics["wer"], 4)})
        self._tell("validated", epoch=judged.epoch, **metrics)

    def _measure(self, recognizer: Recognizer, percent: tuple[float, float]) -> dict[str, float]:
        """Gives the corpus WER of the validation split as wer, and of the old domain's, if one is kept, as oldWer."""
        new, keeping, (low, high) = self._settings.validation, self._settings.keeping, percent
        old = keeping.validation if keeping is not None else ()
        between = low + (high - low) * len(new) / (len(new) + len(old))
        metrics = {"wer": self._validate(recognizer, new, (low, between))}
        return metrics | ({"oldWer": self._validate(recognizer, old, (between, high))} if old else {})

    def _validate(
        self, recognizer: Recognizer, utterances: Sequence[TrainingUtterance], percent: tuple[float, float]
    ) -> float:
        """Gives the corpus WER of utterances; every process transcribes its share.

        Raises:
            _StopRequested: when the pod has been asked to end.
        """
        mine = sorted(utterances, key=lambda one: one.seconds)[self._rank :: self._processes]
        self._whisper.model.eval()
        counts = ErrorCounts()
        # Of the largest share, so that all processes ask each other equally often.
        share = -(-len(utterances) // self._processes)
        for start in range(0, share, _VALIDATION_CHUNK):
            if self._agree_to_stop():
                raise _StopRequested
            chunk = mine[start : start + _VALIDATION_CHUNK]
            texts = recognizer.transcribe([read_samples(one) for one in chunk])
            language = self._settings.language
            counts = total(
                [
                    counts,
                    *(
                        count_errors(normalise(one.text, language), normalise(text, language))
                        for one, text in zip(chunk, texts, strict=True)
                    ),
                ]
            )
            low, high = percent
            self._tell("progress", percent=low + (high - low) * (start + len(chunk)) / share)
        sums = torch.tensor([counts.errors, counts.words], dtype=torch.double, device=self._device)
        if self._processes > 1:
            torch.distributed.all_reduce(sums)
        errors, words = sums.tolist()
        if not words:
            message = "the validation split has no words to count errors on; give the Dataset more transcribed audio"
            raise InvalidInput("NoValidationWords", message)
        return float(errors / words)

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
        # Of many epochs it is longer than an event may be.
        curve = [{"epoch": one.epoch, **one.metrics} for one in state.validations]
        (self._settings.output / CURVE_FILE).write_text(json.dumps(curve, indent=1), encoding="utf-8")
        best = state.best_epoch if state.best_epoch is not None else 0
        self._tell(
            "finished",
            wer=state.best_wer,
            baseline_wer=state.baseline_wer,
            old_wer=_metrics_after(state, best + 1).get("oldWer"),
            old_baseline_wer=_metrics_after(state, 0).get("oldWer"),
            steps=state.step,
            epochs=float(state.epoch),
            training_seconds=state.training_seconds,
            audio_seconds_per_second=state.audio_seconds / max(state.step_seconds, 1e-9),
            stopped_early=state.stopped_early,
            gpus=self._processes if self._device.type == "cuda" else 0,
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


def _metrics_after(state: TrainingState, epoch: int) -> dict[str, float]:
    """Gives what was measured after so many epochs; nothing where an earlier release did not write it down."""
    return next((one.metrics for one in state.validations if one.epoch == epoch), {})


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
