"""Which epoch's adapters are kept, and when a run ends before its last epoch."""

from attune.contract.training import EarlyStopping

from attune_trainer.training.checkpoints import TrainingState


def judge_epoch(state: TrainingState, wer: float, stopping: EarlyStopping | None) -> TrainingState:
    """Counts an epoch as done and says whether it is the best so far, and whether the run is to end.

    Of equals the later one is best: it has seen more. Early stopping counts epochs since the WER last fell by at least
    min_delta, so that many falls too small to matter end a run as well. Patience 2 and min_delta 0.01:
    0.30, 0.20, 0.195, 0.195 ends after the fourth epoch, and the fourth is kept.

    Args:
        state: before the epoch's validation.
        wer: of the validation split, as a fraction.
        stopping: None never ends a run.
    """
    update: dict[str, object] = {"epoch": state.epoch + 1, "step_in_epoch": 0}
    if state.best_wer is None or wer <= state.best_wer:
        update |= {"best_wer": wer, "best_epoch": state.epoch}
    if stopping is not None:
        if state.reference_wer is None or wer <= state.reference_wer - float(stopping.min_delta):
            update |= {"reference_wer": wer, "stale_epochs": 0}
        else:
            stale = state.stale_epochs + 1
            update |= {"stale_epochs": stale, "stopped_early": stale >= stopping.patience}
    return state.model_copy(update=update)
