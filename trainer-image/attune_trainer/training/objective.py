"""What training minimises."""

import torch
from torch import Tensor, nn

from attune_trainer.modeling.whisper import Whisper
from attune_trainer.training.consolidation import Consolidation
from attune_trainer.training.transcripts import IGNORED


class TranscriptionLoss(nn.Module):
    """Cross entropy of the transcripts, averaged over their tokens; plus the penalty that holds on to an old domain."""

    def __init__(self, model: nn.Module, whisper: Whisper, consolidation: Consolidation | None = None) -> None:
        super().__init__()
        self.model = model  # the adapted network; owns all parameters
        self._consolidation = consolidation
        self._whisper = [whisper]  # in a list, so that its network is not registered a second time

    def forward(self, features: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Gives the mean loss of a batch as a scalar.

        Args:
            features: log-mel, shape (utterances, mels, frames).
            inputs: decoder inputs, shape (utterances, tokens).
            targets: what is to be said, same shape; IGNORED counts for nothing.
        """
        network = self._whisper[0].model
        encoded = network.model.encoder(features).last_hidden_state
        hidden = network.model.decoder(
            input_ids=inputs, encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        # The vocabulary's projection is the dearest product of a small Whisper: only real tokens go through it.
        counted = targets != IGNORED
        logits = network.proj_out(hidden[counted])
        loss = nn.functional.cross_entropy(logits.float(), targets[counted])
        if self._consolidation is None:
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            return loss + self._consolidation.penalty()
