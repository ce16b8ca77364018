"""What training minimises."""

import torch
from torch import Tensor, nn

from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.training.consolidation import Consolidation


class TranscriptionLoss(nn.Module):
    """The family's loss, averaged over the transcripts' tokens; plus the penalty that holds on to an old domain."""

    def __init__(self, model: nn.Module, speech_model: SpeechModel, consolidation: Consolidation | None = None) -> None:
        super().__init__()
        self.model = model  # the adapted network; owns all parameters
        self._consolidation = consolidation
        self._speech_model = [speech_model]  # in a list: what it holds is not to be registered a second time

    def forward(self, features: Tensor, inputs: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """Gives the mean loss of a batch as a scalar.

        Args:
            features: what the network hears, shape (utterances, ...).
            inputs: tokens that it reads, shape (utterances, tokens).
            targets: what is to be said, shape (utterances, tokens); IGNORED counts for nothing.
            lengths: samples of each utterance without padding, shape (utterances,).
        """
        loss = self._speech_model[0].loss(features, inputs, targets, lengths)
        if self._consolidation is None:
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            return loss + self._consolidation.penalty()
