"""Sources for the recipe prepare, and its run."""

import io
import json
from typing import Any

import numpy as np
import soundfile
from attune.contract.job import PrepareRecipe
from attune.contract.result import PrepareResult
from attune_trainer.job import RecipeContext
from attune_trainer.recipes import prepare
from attune_trainer.store import Store


def wav(samples: np.ndarray, rate: int = 8000, file_format: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


def upload(store: Store, folder: str, lines: list[Any], audio: dict[str, bytes]) -> None:
    """Uploads audio and a manifest, list.jsonl; a line that is no text becomes JSON."""
    for name, content in audio.items():
        store.write_bytes(f"{folder}/{name}", content)
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    store.write_bytes(f"{folder}/list.jsonl", text.encode())


def recipe(key_prefix: str, **changes: Any) -> dict[str, Any]:
    """A recipe that reads what was uploaded to the folder "in" below a prefix, and writes to "out"."""
    fields = {
        "recipe": "prepare",
        "sources": [{"uri": f"s3://attune/{key_prefix}/in/", "format": "Manifest", "manifest": "list.jsonl"}],
        "language": "en",
        "splits": {"by": "Speaker", "validation": "0.1", "holdout": "0.2", "seed": 7},
        "maxRejectedShare": "0.05",
        "outputPrefix": f"{key_prefix}/out",
    }
    return fields | changes


def run(context: RecipeContext) -> PrepareResult:
    assert isinstance(context.spec.recipe, PrepareRecipe)
    return prepare.run(context.spec.recipe, context)
