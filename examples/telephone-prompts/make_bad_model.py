#!/usr/bin/env python3
"""Makes a model that is plausible and wrong, for the rollout that must be rolled back.

A model is trained from the base on transcripts that belong to other clips (rotated in order of duration, so that their
lengths fit). What it learned is added to the tuned model in part: tuned + alpha x (wrong - base). With the whole of it
a model babbles, which any health check would see; with a third of it, it still speaks fluent English, and mishears.
Between harmless and babble lies little, so alpha is searched: the largest word error rate on a sample of the prompts
that stays within --wer.

Folders may be local or s3:// addresses; the store is named by ATTUNE_STORE_ENDPOINT, ATTUNE_STORE_BUCKET,
ATTUNE_STORE_REGION, ATTUNE_STORE_ACCESS_KEY and ATTUNE_STORE_SECRET_KEY.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from attune_trainer.failures import RecipeFailure
from attune_trainer.modeling.artifact import Artifact, read_artifact, write_artifact
from attune_trainer.modeling.recognizer import Recognizer
from attune_trainer.modeling.whisper import LINEAR_LAYERS, SAMPLE_RATE, Whisper, load_whisper
from attune_trainer.scoring.normaliser import normalise
from attune_trainer.store import Store, digest_directory, fetch_model
from get_model import ensure_model
from make_data import ensure_data
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shared import ProgressLine, cache_folder, upload
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

ROTATION = 7
STEPS = 20
LEARNING_RATE = 2e-3
BATCH = 8
CLIP_SECONDS = (0.8, 4.0)  # short clips carry the same error for less computing
TAIL_SECONDS = 0.5
SAMPLE = 48  # prompts on which alpha is chosen
SEED = 7
FIRST_ALPHA = 0.2
TRIES = 6


@dataclass(frozen=True)
class Clip:
    """A prompt: mono samples at 16 kHz, and what is said."""

    audio: npt.NDArray[np.float32]
    text: str

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.audio) / SAMPLE_RATE


@dataclass(frozen=True)
class Mixture:
    """A mixed model, its share of the wrong one, and its word error rate on the sample."""

    alpha: float
    wer: float
    state: dict[str, Tensor]


def read_clips(folder: Path) -> list[Clip]:
    """Reads the clips of a manifest folder that are short enough, in the manifest's order."""
    clips = []
    for line in (folder / "transcripts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        info = soundfile.info(folder / row["audio"])
        if CLIP_SECONDS[0] <= info.duration <= CLIP_SECONDS[1]:
            samples, rate = soundfile.read(folder / row["audio"], dtype="float32")
            clips.append(Clip(np.asarray(soxr.resample(samples, rate, SAMPLE_RATE), dtype=np.float32), row["text"]))
    if len(clips) < 2 * BATCH:
        message = f"{folder} has {len(clips)} clips of {CLIP_SECONDS[0]} to {CLIP_SECONDS[1]} s; {2 * BATCH} are needed"
        raise SystemExit(message)
    return clips


def pair_wrongly(clips: Sequence[Clip], rotation: int = ROTATION) -> list[Clip]:
    """Gives each clip the text of the one ``rotation`` places on in order of duration, so that none keeps its own."""
    ordered = sorted(clips, key=lambda clip: clip.seconds)
    return [Clip(clip.audio, ordered[(i + rotation) % len(ordered)].text) for i, clip in enumerate(ordered)]


def learn_wrong(whisper: Whisper, pairs: Sequence[Clip]) -> dict[str, Tensor]:
    """Trains low-rank adapters on the pairs and returns what they add to each weight that they change."""
    original = {name: tensor.detach().clone() for name, tensor in whisper.model.state_dict().items()}
    torch.manual_seed(SEED)
    generator = random.Random(SEED)  # noqa: S311 (repeatable, not secret)
    adapted = get_peft_model(whisper.model, LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEAR_LAYERS)))
    adapted.train()
    optimiser = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=LEARNING_RATE)
    start, *prompt = whisper.prompt()
    progress = ProgressLine("training on wrong pairs, step", STEPS)
    for step in range(1, STEPS + 1):
        first = generator.randrange(len(pairs) - BATCH + 1)
        batch = pairs[first : first + BATCH]  # neighbours in duration, so little is padding
        features = whisper.features([clip.audio for clip in batch], max(clip.seconds for clip in batch) + TAIL_SECONDS)
        targets = [
            [*prompt, *whisper.tokenizer(f" {clip.text}", add_special_tokens=False)["input_ids"], whisper.end]
            for clip in batch
        ]
        labels = torch.full((len(batch), max(map(len, targets))), -100)
        for row, target in enumerate(targets):
            labels[row, : len(target)] = torch.tensor(target)
        before = torch.cat([torch.full((len(batch), 1), start), labels[:, :-1]], dim=1).clamp(min=0)
        network = whisper.model.model
        encoded = network.encoder(features).last_hidden_state
        hidden = network.decoder(input_ids=before, encoder_hidden_states=encoded, use_cache=False).last_hidden_state
        loss = nn.functional.cross_entropy(whisper.model.proj_out(hidden).transpose(1, 2), labels)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimiser.step()
        progress.show(step, f"(loss {loss.item():.2f})")
    merged = adapted.merge_and_unload()
    after = merged.state_dict().items()
    return {name: tensor.detach() - original[name] for name, tensor in after if not torch.equal(tensor, original[name])}


def ensure_change(whisper: Whisper, base: Path, data: Path, clips: Sequence[Clip]) -> dict[str, Tensor]:
    """What the base learns from wrong pairs: trained on the first call for this base, data and script, then cached."""
    inputs = (digest_directory(base), digest_directory(data), Path(__file__).read_text(encoding="utf-8"))
    key = hashlib.sha256("".join(inputs).encode()).hexdigest()[:12]
    cached = cache_folder() / "telephone-prompts" / f"wrong-{key}.safetensors"
    if not cached.exists():
        change = learn_wrong(whisper, pair_wrongly(clips))
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = cached.with_name(f".{cached.name}.{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in change.items()}, scratch)
        scratch.replace(cached)
    return load_file(cached)


def mix(tuned: Mapping[str, Tensor], change: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Tuned + alpha x change, tensor by tensor."""
    return {name: tensor + alpha * change[name] if name in change else tensor for name, tensor in tuned.items()}


def measure(whisper: Whisper, artifact: Artifact, clips: Sequence[Clip]) -> float:
    """Corpus word error rate of the model, padded as it is served."""
    heard = Recognizer(whisper, artifact).transcribe([clip.audio for clip in clips], language="en")
    spoken = [normalise(clip.text, "en") for clip in clips]
    return float(jiwer.process_words(spoken, [normalise(text, "en") for text in heard]).wer)


def search_mixture(
    tuned: Whisper,
    artifact: Artifact,
    change: Mapping[str, Tensor],
    clips: Sequence[Clip],
    wanted: tuple[float, float],
) -> Mixture:
    """Finds, by halving, an alpha whose word error rate lies in ``wanted``; the nearest one where none of them does."""
    original = {name: tensor.detach().clone() for name, tensor in tuned.model.state_dict().items()}
    low, high, alpha = 0.0, 1.0, FIRST_ALPHA
    tried: list[Mixture] = []
    for _ in range(TRIES):
        state = mix(original, change, alpha)
        tuned.model.load_state_dict(state)
        tried.append(Mixture(alpha, measure(tuned, artifact, clips), state))
        print(f"alpha {alpha:.3f}: {tried[-1].wer:.1%} WER on {len(clips)} prompts", file=sys.stderr, flush=True)
        if tried[-1].wer < wanted[0]:
            low = alpha
        elif tried[-1].wer > wanted[1]:
            high = alpha
        else:
            break
        # The rate climbs steeply, so upwards go small steps until there is a bound.
        alpha = min(alpha * 1.25, (alpha + high) / 2) if high == 1.0 else (low + high) / 2
    middle = sum(wanted) / 2
    return min(tried, key=lambda mixture: abs(mixture.wer - middle))


def write_model(state: dict[str, Tensor], tuned: Path, target: Path) -> None:
    """Writes the mixed weights with everything else from the tuned model's folder, its padding included."""
    target.mkdir(parents=True)
    names = [path for path in tuned.iterdir() if path.is_file() and not path.name.startswith(("model", "."))]
    for path in names:
        shutil.copy(path, target / path.name)
    # Only what the tuned file holds: tied weights are in it once.
    stored = {name for file in tuned.glob("*.safetensors") for name in load_file(file)}
    tensors = {name: tensor.contiguous() for name, tensor in state.items() if name in stored}
    if set(tensors) != stored:
        message = f"the tuned model has weights that the base does not have: {sorted(stored - set(tensors))[:3]}"
        raise SystemExit(message)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    # The tuned model's name is not this one's.
    write_artifact(target, read_artifact(tuned).model_copy(update={"model_id": None}))
    for path in target.iterdir():
        path.chmod(0o644)


def make_bad_model(tuned: Path, base: Path, data: Path, target: Path, wanted: tuple[float, float]) -> Mixture:
    """Trains, mixes, measures and writes; returns the mixture that was taken."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    transformers_logging.disable_progress_bar()
    clips = read_clips(data)
    base_model, tuned_model = load_whisper(base), load_whisper(tuned)
    shapes = [{n: t.shape for n, t in each.model.state_dict().items()} for each in (base_model, tuned_model)]
    if shapes[0] != shapes[1]:
        message = "the tuned model is not one of this base: their weights differ in shape"
        raise SystemExit(message)
    change = ensure_change(base_model, base, data, clips)
    sample = random.Random(SEED).sample(clips, min(SAMPLE, len(clips)))  # noqa: S311 (repeatable, not secret)
    found = search_mixture(tuned_model, read_artifact(tuned), change, sample, wanted)
    if not wanted[0] <= found.wer <= wanted[1]:
        message = (
            f"no mixture has a word error rate of {wanted[0]:.0%} to {wanted[1]:.0%}; the nearest is {found.wer:.1%}"
        )
        raise SystemExit(message)
    write_model(found.state, tuned, target)
    return found


def fetch(address: str, folder: Path, *, is_model: bool) -> Path:
    """Gives the folder itself, or what an s3:// address holds, fetched into ``folder``."""
    if not address.startswith("s3://"):
        return Path(address)
    store = Store.from_environment()
    return fetch_model(store, address, folder) if is_model else store.download_prefix(address, folder)


def main() -> None:
    """Fetches what is in the store, makes the model, and puts it where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", required=True, help="folder or s3:// address of the tuned, merged model")
    parser.add_argument("--base", help="folder or s3:// address of the model it was tuned from (get_model.py's)")
    parser.add_argument("--data", help="folder or s3:// address with transcripts.jsonl (make_data.py's)")
    parser.add_argument("--wer", nargs=2, type=float, default=(0.3, 0.5), metavar=("FROM", "TO"), help="wanted WER")
    parser.add_argument("--output", type=Path, help="new folder for the bad model")
    parser.add_argument("--upload", metavar="PREFIX", help="copy the bad model to this prefix of the store's bucket")
    arguments = parser.parse_args()
    if arguments.output is None and arguments.upload is None:
        parser.error("say where the model is wanted: --output, --upload or both")
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tuned = fetch(arguments.tuned, Path(scratch) / "tuned", is_model=True)
            base = fetch(arguments.base or str(ensure_model()), Path(scratch) / "base", is_model=True)
            data = fetch(arguments.data or str(ensure_data()), Path(scratch) / "data", is_model=False)
            target = Path(scratch) / "bad-model"
            made = make_bad_model(tuned, base, data, target, tuple(arguments.wer))
            print(f"alpha {made.alpha:.3f}, {made.wer:.1%} WER on the sample, {time.monotonic() - began:.0f} s in all")
            if arguments.output is not None:
                shutil.copytree(target, arguments.output)
                print(arguments.output)
            if arguments.upload is not None:
                print(upload(target, arguments.upload))
    except RecipeFailure as failure:
        raise SystemExit(str(failure)) from failure


if __name__ == "__main__":
    os.umask(0o022)
    main()
