"""Speech recognisers: loading, padding, transcription, and what training needs to know of them."""

from attune_trainer.modeling.artifact import Artifact
from attune_trainer.modeling.recognizer import Recognizer, load_recognizer

__all__ = ["Artifact", "Recognizer", "load_recognizer"]
