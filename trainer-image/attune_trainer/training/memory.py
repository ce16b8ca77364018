"""What to change when a batch does not fit into memory."""

from attune.contract.training import Padding

from attune_trainer.failures import OutOfMemory
from attune_trainer.training.loader import TrainingBatch
from attune_trainer.training.settings import TrainingSettings


def explain_exhausted(batch: TrainingBatch, settings: TrainingSettings) -> OutOfMemory:
    """Names the batch that did not fit, and a setting that halves it.

    Padded to buckets, 16 utterances of 3 s are 48 s, so maxBatchSeconds 24 makes 8 of them; padded to the window, it is
    their number that costs, so batchSize 8 does. With twice as many batches to a step, the run stays what it was.
    """
    count = batch.features.shape[0]
    what = f"a batch of {count} utterances, each padded to {batch.bucket:g} s, does not fit into memory"
    if count == 1:
        return OutOfMemory(
            f"{what}: give the pod a GPU with more memory or, on a CPU, more memory in spec.resources.limits; method "
            "QLora and a smaller base model need less"
        )
    smaller = (
        f"maxBatchSeconds to {max(1, int(count * batch.bucket / 2))}"
        if settings.padding is Padding.BUCKETS
        else f"batchSize to {count // 2}"
    )
    batches = 2 * (settings.hyperparameters.gradient_accumulation or 1)
    return OutOfMemory(
        f"{what}: set spec.hyperparameters.{smaller} and gradientAccumulation to {batches}, or give the pod more memory"
    )
