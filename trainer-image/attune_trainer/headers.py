"""HTTP headers of our own, between clients, the inference server and the scorer."""

from typing import Final

# Of every answer: which model and which arm spoke.
MODEL_ID_HEADER: Final = "x-attune-model-id"
TRACK_HEADER: Final = "x-attune-track"
# Of a request: it gives way to requests without it.
PRIORITY_HEADER: Final = "x-attune-priority"
BACKGROUND: Final = "background"
