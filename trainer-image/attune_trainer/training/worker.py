"""One training process: `python -m attune_trainer.training.worker SETTINGS PIPE`, started by DeepSpeed's launcher.

Heavy libraries are imported while the Job's own process still downloads the inputs; the settings file appears when they
are there.
"""

import contextlib
import itertools
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from attune.contract.exitcode import ExitCode
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from attune_trainer.failures import PeerLost, RecipeFailure, from_exception, is_out_of_memory
from attune_trainer.logs import configure_logging
from attune_trainer.modeling.artifact import read_artifact
from attune_trainer.modeling.families import load_model
from attune_trainer.modeling.recognizer import Recognizer
from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.training import checkpoints
from attune_trainer.training.arithmetic import choose_dtype
from attune_trainer.training.batches import plan_epoch
from attune_trainer.training.checkpoints import TrainingState
from attune_trainer.training.consolidation import Consolidation, Importance
from attune_trainer.training.course import Course
from attune_trainer.training.engine import SHARES_WEIGHTS, build_engine, copy_trained, distributed, is_peer_lost
from attune_trainer.training.epochs import Epochs, check_augmentation
from attune_trainer.training.estimate import choose_probe, extrapolate
from attune_trainer.training.events import EventWriter
from attune_trainer.training.export import clean_generation, describe_artifact, is_stored_in_fp32
from attune_trainer.training.hardware import describe_hardware, peak_memory
from attune_trainer.training.loader import BatchLoader, TrainingBatch, read_samples
from attune_trainer.training.memory import explain_exhausted
from attune_trainer.training.methods import choose_method, load_state, save_state
from attune_trainer.training.objective import TranscriptionLoss
from attune_trainer.training.schedule import learning_rate_factor
from attune_trainer.training.selection import judge_epoch
from attune_trainer.training.settings import MODEL_FOLDER, TrainingSettings, TrainingUtterance
from attune_trainer.training.transcripts import TranscriptEncoder, select_usable
from attune_trainer.training.validation import Measured, Validator
from attune_trainer.training.weights import trained_parameters

_log = logging.getLogger("attune_trainer.training")

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
        self._leads_pod = os.environ.get("LOCAL_RANK", "0") == "0"
        self._accumulation = self._parameters.gradient_accumulation or 1
        self._signalled = False
        self._device = torch.device(get_accelerator().current_device_name())
        self._gpus = self._processes if self._device.type == "cuda" else 0
        self._baseline_seconds = 0.0
        self._probe_began: float | None = None  # in step_seconds; None where this attempt went on from a checkpoint
        self._validator = Validator(
            settings,
            self._device,
            rank=self._rank,
            processes=self._processes,
            raise_if_stopped=self._raise_if_stopped,
            report=lambda percent: self._tell("progress", percent=percent),
        )

    def run(self) -> None:
        """Trains from the start or from a checkpoint to the end, and writes what came out.

        Raises:
            RecipeFailure: for whatever a person has to mend.
            _StopRequested: after a checkpoint, when the pod has been asked to end.
        """
        signal.signal(signal.SIGTERM, self._on_signal)
        torch.manual_seed(self._parameters.seed)
        settings = self._settings
        self._method = choose_method(settings, self._device)
        self._speech_model = load_model(settings.base, self._device)
        check_augmentation(settings.augmentation, self._speech_model)
        self._encoder = TranscriptEncoder(self._speech_model, settings.language)
        self._train = select_usable(settings.train, self._encoder, self._speech_model)
        state = self._resumed_state() or self._begin()
        self._tell("baseline", **state.baseline_metrics)
        if state.estimate is not None:
            self._tell("estimate", **state.estimate.model_dump(by_alias=True))
        dtype = choose_dtype(self._parameters.precision, self._device)
        hardware = describe_hardware(self._device, dtype, self._processes)
        _log.info("training begins", extra=hardware.model_dump())
        self._engine = build_engine(self._attach(), settings, dtype)
        self._best = settings.checkpoints / "best" / checkpoints.BEST_FILE
        if settings.resume is not None:
            self._restore(settings.resume)
        self._state = state.model_copy(update={"hardware": tuple(dict.fromkeys((*state.hardware, hardware)))})
        self._train_to_the_end()
        self._finish()

    def _begin(self) -> TrainingState:
        """Measures the untuned model, as it is served."""
        artifact = read_artifact(self._settings.base)
        if not artifact.language:
            artifact = artifact.model_copy(update={"language": self._encoder.language})
        self._tell_stage("Baseline", percent=10)
        began = time.monotonic()
        measured = self._measure(Recognizer(self._speech_model, artifact), (10, 20))
        self._baseline_seconds = time.monotonic() - began
        return TrainingState(
            fingerprint=self._settings.fingerprint,
            baseline_wer=measured.metrics["wer"],
            course=Course().with_validation(0, 0, measured.metrics),
            baseline_counts=measured.counts,
        )

    def _attach(self) -> TranscriptionLoss:
        """Makes the network trainable, plans the run, and gives what is to be minimised."""
        settings = self._settings
        trained = self._speech_model
        clean_generation(trained)
        if self._parameters.dropout is not None:
            trained.set_dropout(float(self._parameters.dropout))
        self._model = self._served = self._method.attach(trained)
        if settings.distributed.deepspeed.zero_stage == SHARES_WEIGHTS:
            # Processes that transcribe take turns of their own, so each needs a whole network for that.
            self._speech_model = load_model(settings.base, self._device)
            clean_generation(self._speech_model)
            self._served = self._method.attach(self._speech_model)
        torch.manual_seed(self._parameters.seed + self._rank)  # dropout differs between processes, adapters do not
        self._artifact = describe_artifact(
            self._speech_model,
            settings.padding,
            base_uri=settings.base_uri,
            model_id=settings.model_id,
            language=self._encoder.language,
            history=settings.history,
        )
        self._recognizer = Recognizer(self._speech_model, self._artifact)
        self._put_aside()
        self._epochs = Epochs(
            settings,
            self._train,
            self._recognizer.buckets,
            window_seconds=self._speech_model.window_seconds,
            batches=self._processes * self._accumulation,
        )
        return TranscriptionLoss(self._model, trained, self._estimate_importance())

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
        sample = select_usable(keeping.sample, self._encoder, self._speech_model)
        steps = plan_epoch(
            [one.seconds for one in sample],
            self._recognizer.buckets,
            batch_size=self._parameters.batch_size,
            max_batch_seconds=self._parameters.max_batch_seconds,
            seed=self._parameters.seed,
            epoch=0,
            processes=self._processes,
        )
        loader = BatchLoader(self._speech_model, self._encoder, sample, [step[self._rank] for step in steps])
        importance = Importance(self._model, self._speech_model)
        objective = TranscriptionLoss(self._model, self._speech_model)
        try:
            for number, batch in enumerate(loader):
                self._raise_if_stopped()
                self._tell("progress", step=number, total_steps=len(steps))
                with self._memory_explained(batch):
                    importance.add(objective, *(one.to(self._device) for one in batch.tensors))
        finally:
            loader.close()
        if self._processes > 1:
            importance.share()
        return importance.consolidate(float(keeping.ewc.strength))

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
        return state.epoch < self._parameters.epochs and state.step_in_epoch == len(self._epochs.plans[state.epoch])

    def _train_epoch(self) -> None:
        """Trains to the end of the epoch, or of the budget."""
        state = self._state
        steps = self._epochs.plans[state.epoch][state.step_in_epoch :]
        augmenter = self._epochs.augmenter(state.epoch)
        seconds = self._epochs.seconds(augmenter)
        mine = [batch for step in steps for batch in step[self._rank :: self._processes]]
        loader = BatchLoader(self._speech_model, self._encoder, self._train, mine, augmenter)
        self._tell_stage("Training", step=state.step, total_steps=self._epochs.steps)
        self._engine.train()
        try:
            began = time.monotonic()
            batches = iter(loader)
            for planned in steps:
                loss, stop, spent = self._train_step(itertools.islice(batches, self._accumulation))
                now = time.monotonic()
                step_audio = sum(seconds[index] for one in planned for index in one.members)
                self._advance(loss, step_audio, now - began)
                began = now
                self._estimate()
                self._report_step(loss)
                if stop:
                    raise _StopRequested
                if spent and self._state.step < self._epochs.steps:
                    _log.info("the budget is spent", extra={"step": self._state.step})
                    self._state = self._state.model_copy(update={"budget_reached": True})
                    break
                if self._state.step % self._settings.checkpoint.every_steps == 0:
                    self._save_checkpoint()
                    began = time.monotonic()
        finally:
            loader.close()

    def _train_step(self, batches: Iterable[TrainingBatch]) -> tuple[float, bool, bool]:
        """Makes one optimiser step; gives all processes' mean loss, whether to stop, whether the budget is spent."""
        rate = float(self._parameters.learning_rate) * learning_rate_factor(
            self._state.step, self._epochs.steps, float(self._parameters.warmup_ratio)
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        losses = torch.zeros((), dtype=torch.double, device=self._device)
        shared = (0.0, False, False)
        for number, batch in enumerate(batches, start=1):
            with self._memory_explained(batch):
                loss = self._engine(*(one.to(self._device) for one in batch.tensors))
                losses += loss.detach()
                if number == self._accumulation:
                    shared = self._share(losses / number)
                self._engine.backward(loss)
                self._engine.step()
        if not self._engine.was_step_applied():  # DeepSpeed passes over gradients that are not finite
            raise self._diverged(self._state.step + 1)
        return shared

    def _share(self, loss: Tensor) -> tuple[float, bool, bool]:
        """Gives what _train_step does, in one message for all that the processes must agree on.

        Raises:
            RecipeFailure: Diverged.
        """
        wishes = torch.tensor([self._stop_wanted(), self._budget_spent()], dtype=torch.double, device=loss.device)
        shared = torch.cat([loss.reshape(1), wishes])
        if self._processes > 1:
            torch.distributed.all_reduce(shared)
        summed, stop, spent = shared.tolist()
        if not math.isfinite(summed):
            raise self._diverged(self._state.step + 1)
        return summed / self._processes, stop > 0, spent > 0

    def _diverged(self, step: int) -> RecipeFailure:
        message = (
            f"the loss or its gradient is no longer finite at step {step} of {self._epochs.steps}; lower "
            "spec.hyperparameters.learningRate or maxGradNorm, or raise warmupRatio"
        )
        return RecipeFailure(ExitCode.DIVERGED, "Diverged", message)

    @contextlib.contextmanager
    def _memory_explained(self, batch: TrainingBatch) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise explain_exhausted(batch, self._settings) from error

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
        first, last = probe = choose_probe(self._epochs.steps)
        if state.step == first:
            self._probe_began = state.step_seconds
        elif state.step == last and self._probe_began is not None:
            estimate = extrapolate(
                self._epochs.work(),
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
        epoch = state.epoch + state.step_in_epoch / len(self._epochs.plans[state.epoch])
        self._tell(
            "progress",
            step=state.step,
            total_steps=self._epochs.steps,
            epoch=epoch,
            metrics=metrics,
            percent=20 + 70 * state.step / self._epochs.steps,
        )

    def _finish_epoch(self) -> None:
        """Validates as the model will be served, keeps the best weights, and decides about stopping early."""
        state = self._state
        self._check_weights()
        self._tell_stage("Validating")
        began = time.monotonic()
        done = 20 + 70 * state.step / self._epochs.steps
        self._take_up()
        measured = self._measure(self._recognizer, (done, done))
        metrics = measured.metrics
        judged = judge_epoch(state, metrics["wer"], self._settings.early_stopping)
        epochs = self._epochs.done(state.step)
        update: dict[str, Any] = {
            "training_seconds": state.training_seconds + time.monotonic() - began,
            "course": state.course.with_validation(epochs, state.step, metrics),
            "peak_memory_bytes": max(state.peak_memory_bytes, peak_memory(self._device, self._processes)),
        }
        if judged.best_epoch == state.epoch:
            update["best_counts"] = measured.counts
            if self._rank == 0:
                save_state(self._method.state(self._served), self._best)
        self._state = judged.model_copy(update=update)
        self._put_aside()
        _log.info("epoch finished", extra={"epoch": epochs, **{name: round(one, 4) for name, one in metrics.items()}})
        self._tell("validated", epoch=epochs, **metrics)

    def _take_up(self) -> None:
        """Brings the network that transcribes up to date, where it is not the one that trains."""
        if self._served is not self._model:
            self._served.to(self._device)
            copy_trained(self._model, self._served)

    def _put_aside(self) -> None:
        """Clears the device of it again."""
        if self._served is not self._model:
            self._served.to("cpu")

    def _measure(self, recognizer: Recognizer, percent: tuple[float, float]) -> Measured:
        self._speech_model.model.eval()
        return self._validator.measure(recognizer, percent)

    def _check_weights(self) -> None:
        """Passes when every trained weight is a number; else nothing is kept of them, and what was kept stays.

        A gradient that is none shows in the next step's loss, which the last one before a checkpoint does not have.
        """
        if not all(bool(weight.isfinite().all()) for weight in trained_parameters(self._model).values()):
            raise self._diverged(self._state.step)

    def _save_checkpoint(self) -> None:
        """Writes weights, optimiser, random state, position and best weights; complete once it is sealed."""
        self._check_weights()
        state = self._state
        folder = self._settings.checkpoints / checkpoints.folder_name(state.step, state.epoch, self._settings.mark)
        scaler = self._engine.torch_autocast_z0_gradscaler  # of fp16 alone; DeepSpeed does not save it
        random_states: list[Any] = [None] * self._processes
        mine = {"host": torch.get_rng_state()}
        if self._device.type == "cuda":
            mine["device"] = torch.cuda.get_rng_state(self._device)
        if self._processes > 1:
            torch.distributed.all_gather_object(random_states, mine)
        else:
            random_states = [mine]
        if self._leads_pod:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._engine.save_checkpoint(
            str(folder / checkpoints.ENGINE_FOLDER),
            tag="state",
            client_state={"random": random_states, "scaler": scaler.state_dict() if scaler else None},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        if self._processes > 1:
            torch.distributed.barrier()
        if self._rank == 0:
            if self._best.is_file():
                shutil.copyfile(self._best, folder / checkpoints.BEST_FILE)
            (folder / checkpoints.STATE_FILE).write_text(state.model_dump_json(), encoding="utf-8")
        self._seal(folder)
        if self._leads_pod:
            self._events.send("checkpoint", step=state.step, folder=str(folder))

    def _seal(self, folder: Path) -> None:
        """Seals a checkpoint of which each pod has a part on its own disk."""
        parts: list[Any] = []
        if self._settings.distributed.nodes > 1:
            parts = [{}] * self._processes
            mine = checkpoints.digest_part(folder) if self._leads_pod and self._rank else {}
            torch.distributed.all_gather_object(parts, mine)
        if self._rank == 0:
            checkpoints.seal(folder, parts)

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
        if client.get("scaler"):
            self._engine.torch_autocast_z0_gradscaler.load_state_dict(client["scaler"])
        mine = client["random"][self._rank]
        torch.set_rng_state(mine["host"])
        if self._device.type == "cuda" and "device" in mine:
            torch.cuda.set_rng_state(mine["device"], self._device)
        best = folder / checkpoints.BEST_FILE
        if self._rank == 0 and best.is_file():
            self._best.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(best, self._best)

    def _finish(self) -> None:
        """Exports the best weights, proves that what was written computes the same, and says what came out."""
        if self._rank != 0:
            return
        self._tell_stage("Merging", percent=92)
        settings = self._settings
        self._method.load(self._served.to(self._device), load_state(self._best))
        self._speech_model.model.eval()
        probe = min(settings.validation, key=lambda one: one.seconds)
        before = self._probe(self._speech_model, probe)
        self._method.export(
            self._served, self._speech_model, settings.output, base=settings.base, artifact=self._artifact
        )
        written = settings.output / MODEL_FOLDER
        difference = float((self._probe(load_model(written, self._device), probe) - before).abs().max())
        tolerance = _MERGE_TOLERANCE if is_stored_in_fp32(written) else 10 * _MERGE_TOLERANCE
        if difference > tolerance * float(before.abs().max()):
            raise RuntimeError(f"the model that was written differs from the trained one by {difference:.2e} in logits")
        state = self._state
        (settings.output / checkpoints.STATE_FILE).write_text(state.model_dump_json(), encoding="utf-8")
        self._tell(
            "finished",
            wer=state.best_wer,
            baseline_wer=state.baseline_wer,
            steps=state.step,
            total_steps=self._epochs.steps,
            epochs=self._epochs.done(state.step),
            training_seconds=state.training_seconds,
            audio_seconds_per_second=state.audio_seconds / max(state.step_seconds, 1e-9),
            stopped_early=state.stopped_early,
            gpus=self._gpus,
        )

    @torch.inference_mode()
    def _probe(self, speech_model: SpeechModel, utterance: TrainingUtterance) -> Tensor:
        """Gives the logits of one utterance's own transcript."""
        audio, bucket = [read_samples(utterance)], self._recognizer.buckets[-1]
        tokens = self._encoder.batch([(self._encoder.encode(utterance.text) or [])[:64]])
        tensors = (speech_model.features(audio, bucket), tokens.inputs, speech_model.lengths(audio, bucket))
        return speech_model.logits(*(one.to(self._device) for one in tensors))

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self._signalled = True

    def _stop_wanted(self) -> bool:
        return self._signalled or self._settings.stop_file.exists()

    def _budget_spent(self) -> bool:
        budget = self._settings.budget
        return budget is not None and budget.is_spent(self._state.training_seconds, self._gpus)

    def _raise_if_stopped(self) -> None:
        """Ends every process once any was asked to end; all of them have to call this at the same point."""
        asked = torch.tensor(float(self._stop_wanted()), device=self._device)
        if self._processes > 1:
            torch.distributed.all_reduce(asked)
        if asked > 0:
            raise _StopRequested

    def _tell_stage(self, stage: str, **fields: Any) -> None:
        self._tell("progress", stage=stage, **fields)

    def _tell(self, kind: str, **fields: Any) -> None:
        if self._rank == 0:
            self._events.send(kind, **fields)


def wait_for(file: Path, events: EventWriter) -> None:
    """Waits for the settings; ends with BrokenPipeError when the Job's process is gone."""
    while not file.exists():
        events.send("waiting")
        time.sleep(0.1)


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
        with distributed():
            Training(settings, events).run()
    except _StopRequested:
        events.send("stopped")
        return int(ExitCode.TERMINATED)
    except BrokenPipeError:
        _log.error("the Job's process is gone; training ends")
        return int(ExitCode.INTERNAL_ERROR)
    except Exception as error:  # noqa: BLE001 (the Job's process is told of every one)
        # Within a pod the one that was lost says why, or the launcher does.
        lost = int(os.environ.get("CROSS_SIZE", "1")) > 1 and is_peer_lost(error)
        failure = PeerLost() if lost else from_exception(error, "finetune")
        if failure.code is ExitCode.INTERNAL_ERROR:
            _log.exception("training failed")
        events.send_failure(failure)
        return int(failure.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
