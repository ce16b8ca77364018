#!/usr/bin/env python3
"""The Mini model: a Whisper-architecture checkpoint of about 1 MB, trained from scratch on synthesised speech.

It knows 60 words, spells them with a vocabulary of 33 characters and special tokens, and hears espeak-ng's voices. It
proves machinery, not accuracy. Its attune.json asks for length buckets: it never heard 30 s of padding. Training takes
about two minutes on two cores; model and corpora are kept in the cache under the hash of this file, so that every test
and every CI run shares them.

    python tests/assets/mini_model.py             # trains the model and makes both corpora, showing progress

In code: ensure_mini_model() is the model's folder, ensure_mini_corpus("old" | "new-voices") a folder with WAVs and
transcripts.jsonl, as a Dataset of format Manifest takes it. The model hears "old" voices well; "new-voices" are what a
FineTune is there for.
"""

# ruff: noqa: T201 (a person watches this script)

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

# Threads that wait in a loop cost more than they bring to so small a network, above all on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jiwer
import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from attune.contract.training import Padding
from attune_trainer.modeling.artifact import Artifact, write_artifact
from attune_trainer.modeling.buckets import BUCKETS
from attune_trainer.modeling.recognizer import Recognizer, load_recognizer
from attune_trainer.modeling.whisper import SAMPLE_RATE, SlicedWhisperEncoder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.utils import logging as transformers_logging

Audio = npt.NDArray[np.float32]
CorpusKind = Literal["old", "new-voices"]

# Ids of text come first: generation takes every id above no-timestamps for a timestamp.
CHARACTERS: Final = "Ġabcdefghijklmnopqrstuvwxyz'"
END, START, PREVIOUS, NO_SPEECH, NO_TIMESTAMPS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)

TRAINING_UTTERANCES: Final = 7000
STEPS: Final = 2000
BATCH: Final = 32
CTC_WEIGHT: Final = 0.5
LEARNING_RATE: Final = 2e-3
WARM_UP_STEPS: Final = 100
SEED: Final = 7
MAX_DEV_WER: Final = 0.15

# Read on import, so that an edit of this file can't put what the old one made in the new one's place.
_VERSION: Final = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
_FRAME_SECONDS: Final = 0.01
_SILENCE_BELOW_PEAK: Final = 2.0  # Whisper floors log-mel at 8 below the peak (log10 of power), then divides by 4

NUMBERS: Final = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
THINGS: Final = ("light", "door", "window", "music", "radio", "fan", "heater", "alarm", "timer", "camera")
ROOMS: Final = ("kitchen", "bedroom", "garage", "office", "hall")
PEOPLE: Final = ("anna", "peter", "maria", "robert")
COLOURS: Final = ("red", "blue", "green", "white")
DAYS: Final = ("today", "tomorrow", "morning", "evening")
SPANS: Final = ("minutes", "hours")
VERBS: Final = ("turn", "open", "close", "start", "stop", "set", "call", "play")
SMALL: Final = ("on", "off", "the", "my", "in", "for", "at", "and", "please", "now", "is")
WORDS: Final = (*NUMBERS, *THINGS, *ROOMS, *PEOPLE, *COLOURS, *DAYS, *SPANS, *VERBS, *SMALL)


@dataclass(frozen=True)
class Voice:
    """One speaker: an espeak-ng voice at a pitch (0 to 99) and a speed (words a minute)."""

    name: str
    voice: str
    pitch: int
    speed: int


OLD_VOICES: Final = tuple(
    Voice(f"old-{index}", voice, pitch, speed)
    for index, (voice, pitch, speed) in enumerate(
        (
            ("en-us", 50, 230),
            ("en-us+m3", 35, 240),
            ("en-us+f2", 60, 250),
            ("en-gb", 50, 230),
            ("en-gb+m7", 50, 240),
            ("en-gb+f4", 55, 230),
        )
    )
)
NEW_VOICES: Final = tuple(
    Voice(f"new-{index}", voice, pitch, speed)
    for index, (voice, pitch, speed) in enumerate(
        (
            ("en-gb-scotland+klatt2", 30, 260),
            ("en-gb-scotland+f5", 80, 250),
            ("en-029+klatt3", 40, 270),
            ("en-029+m4", 20, 260),
            ("en-029+f5", 85, 240),
            ("en-gb-x-gbcwmd+klatt4", 60, 260),
            ("en-gb-x-gbcwmd+croak", 30, 250),
            ("en-gb-x-gbclan+m5", 15, 270),
            ("en-gb-x-gbclan+f5", 90, 250),
            ("en-us-nyc+klatt", 45, 280),
            ("en-us-nyc+whisper", 50, 240),
            ("en-us-nyc+m8", 25, 280),
        )
    )
)


@dataclass(frozen=True)
class Utterance:
    """A sentence, its speaker, and its sound (mono, 16 kHz)."""

    text: str
    speaker: str
    audio: Audio


def make_sentence(generator: random.Random) -> str:
    """Draws a sentence of two to six words from the grammar."""
    number, thing, room = generator.choice(NUMBERS), generator.choice(THINGS), generator.choice(ROOMS)
    other, switch, colour = generator.choice(THINGS), generator.choice(("on", "off")), generator.choice(COLOURS)
    person, day, whose = generator.choice(PEOPLE), generator.choice(DAYS), generator.choice(("the", "my"))
    patterns = (
        lambda: " ".join(generator.choice(NUMBERS) for _ in range(generator.randint(2, 4))),
        lambda: f"turn {switch} {whose} {room} {thing}",
        lambda: f"please turn {switch} {whose} {thing}",
        lambda: f"{generator.choice(('open', 'close'))} {whose} {colour} {thing}",
        lambda: f"{generator.choice(('start', 'stop'))} the {thing} and the {other}",
        lambda: f"set {whose} {thing} for {number} {generator.choice(SPANS)}",
        lambda: f"set the {thing} at {number} {day}",
        lambda: f"call {person} at {number} {day}",
        lambda: f"call {person} and {generator.choice(PEOPLE)} {generator.choice((*DAYS, 'now'))}",
        lambda: f"play music in the {room} {generator.choice((*DAYS, 'now'))}",
        lambda: f"is the {colour} {thing} {generator.choice((switch, 'in the ' + room))}",
    )
    return generator.choice(patterns)()


def make_sentences(count: int, seed: int, without: frozenset[str] = frozenset()) -> list[str]:
    """Draws different sentences, none of which is in ``without``."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        sentence = make_sentence(generator)
        if sentence not in without:
            found[sentence] = None
    return list(found)


def ensure_espeak() -> str:
    """Returns espeak-ng's path, and installs it where apt-get and the right to do so are there.

    Raises:
        RuntimeError: it is missing and can't be installed; the message says what to do.
    """
    found = shutil.which("espeak-ng")
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        print("installing espeak-ng, which speaks the mini corpora", flush=True)
        subprocess.run(
            ["apt-get", "install", "-y", "--no-install-recommends", "espeak-ng"],
            check=False,
            capture_output=True,
            timeout=600,
        )
        found = shutil.which("espeak-ng")
    if found is None:
        message = "espeak-ng is missing, which speaks the mini corpora: install it (Debian: apt-get install espeak-ng)"
        raise RuntimeError(message)
    return found


def speak(program: str, text: str, voice: Voice, *, pitch_shift: int = 0, speed_shift: int = 0) -> Utterance:
    """Synthesises a sentence."""
    command = [program, "-v", voice.voice, "-p", str(voice.pitch + pitch_shift), "-s", str(voice.speed + speed_shift)]
    done = subprocess.run([*command, "--stdout", text], capture_output=True, check=True, timeout=60)
    # espeak-ng can't know the length when it writes the header to a pipe; raw samples follow the 44 bytes.
    samples = np.frombuffer(done.stdout[44:], dtype="<i2").astype(np.float32) / 32768
    rate = int.from_bytes(done.stdout[24:28], "little")
    return Utterance(text, voice.name, np.asarray(soxr.resample(samples, rate, SAMPLE_RATE), dtype=np.float32))


def speak_all(sentences: Sequence[str], voices: Sequence[Voice], seed: int, *, vary: bool) -> list[Utterance]:
    """Synthesises each sentence with the voices in turn, with some freedom of pitch and speed where ``vary``."""
    program = ensure_espeak()
    generator = random.Random(seed)
    jobs = [
        (text, voices[index % len(voices)], generator.randint(-6, 6) * vary, generator.randint(-15, 15) * vary)
        for index, text in enumerate(sentences)
    ]
    done: list[Utterance] = []
    with ThreadPoolExecutor(4) as pool:
        for utterance in pool.map(
            lambda job: speak(program, job[0], job[1], pitch_shift=job[2], speed_shift=job[3]), jobs
        ):
            done.append(utterance)
            if len(done) % 500 == 0:
                print(f"  spoken: {len(done)} of {len(jobs)}", flush=True)
    return done


def dev_utterances() -> list[Utterance]:
    """The sentences on which training is measured; the "old" corpus says the same sentences."""
    return speak_all(make_sentences(200, SEED + 1), OLD_VOICES, SEED + 1, vary=False)


def make_tokenizer() -> WhisperTokenizerFast:
    """Builds the tokenizer: one token for each character, then the special tokens."""
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    special = (END, START, PREVIOUS, NO_SPEECH, NO_TIMESTAMPS)
    vocabulary |= {token: len(CHARACTERS) + index for index, token in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return WhisperTokenizerFast(tokenizer_object=tokenizer, unk_token=END, bos_token=END, eos_token=END, pad_token=END)


def make_model(ids: dict[str, int]) -> WhisperForConditionalGeneration:
    """Builds the untrained network: width 64, two layers each in encoder and decoder."""
    config = WhisperConfig(
        vocab_size=len(ids),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        decoder_start_token_id=ids[START],
    )
    model = WhisperForConditionalGeneration(config)
    model.model.encoder.__class__ = SlicedWhisperEncoder
    model.generation_config = GenerationConfig(
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        decoder_start_token_id=ids[START],
        prev_sot_token_id=ids[PREVIOUS],
        no_timestamps_token_id=ids[NO_TIMESTAMPS],
        suppress_tokens=[ids[START], ids[PREVIOUS], ids[NO_SPEECH]],
        begin_suppress_tokens=[ids["Ġ"], ids[END]],
        max_length=config.max_target_positions,
        is_multilingual=False,
        return_timestamps=False,
    )
    return model


@dataclass(frozen=True)
class Example:
    """What one training clip is to the network: log-mel (80, frames) and token ids without the start."""

    mel: Tensor
    tokens: tuple[int, ...]


def make_examples(utterances: Sequence[Utterance], tokenizer: WhisperTokenizerFast) -> list[Example]:
    """Computes log-mel features at each clip's own length, and the targets."""
    extractor = WhisperFeatureExtractor()
    ids = tokenizer.get_vocab()
    examples = []
    for utterance in utterances:
        frames = 2 * math.ceil(len(utterance.audio) / SAMPLE_RATE / (2 * _FRAME_SECONDS))
        mel = extractor(
            utterance.audio,
            padding="max_length",
            max_length=frames * extractor.hop_length,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
        )["input_features"][0]
        text = tokenizer(utterance.text, add_special_tokens=False)["input_ids"]
        examples.append(Example(mel, (ids[NO_TIMESTAMPS], *text, ids[END])))
    return examples


def draw_batches(examples: Sequence[Example], generator: random.Random) -> Iterator[tuple[list[Example], int]]:
    """Draws batches of clips of like length, forever, each with the frames to pad it to: as buckets will pad it."""
    while True:
        order = sorted(range(len(examples)), key=lambda i: examples[i].mel.shape[1] + generator.uniform(-10, 10))
        starts = list(range(0, len(order) - BATCH + 1, BATCH))
        generator.shuffle(starts)
        for start in starts:
            batch = [examples[i] for i in order[start : start + BATCH]]
            longest = max(example.mel.shape[1] for example in batch)
            yield batch, longest + 2 * generator.randint(25, 50)


def collate(batch: Sequence[Example], frames: int, end: int, generator: random.Random) -> tuple[Tensor, Tensor]:
    """Stacks features (batch, 80, frames), masked in places, and labels (batch, tokens) with -100 after the end."""
    features = torch.empty(len(batch), 80, frames)
    width = max(len(example.tokens) for example in batch)
    labels = torch.full((len(batch), width), -100)
    for row, example in enumerate(batch):
        length = example.mel.shape[1]
        features[row] = example.mel.max() - _SILENCE_BELOW_PEAK
        features[row, :, :length] = example.mel
        for _ in range(2):
            low, first = generator.randrange(80 - 10), generator.randrange(max(1, length - 8))
            features[row, low : low + generator.randint(0, 10)] = 0.0
            features[row, :, first : first + generator.randint(0, 8)] = 0.0
        labels[row, : len(example.tokens)] = torch.tensor(example.tokens)
    return features, labels


def train(model: WhisperForConditionalGeneration, examples: Sequence[Example], start: int, end: int) -> None:
    """Trains for STEPS steps: AdamW, warm-up, cosine to nothing."""
    generator = random.Random(SEED)
    # A second, frame by frame reading of the encoder's output, thrown away afterwards: with it the encoder learns to
    # spell before the decoder knows where to look, and the whole needs a fraction of the steps.
    speller = nn.Linear(model.config.d_model, model.config.vocab_size)
    optimiser = torch.optim.AdamW(
        [*model.parameters(), *speller.parameters()], lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / WARM_UP_STEPS, 0.5 * (1 + math.cos(math.pi * min(1.0, step / STEPS)))),
    )
    began = time.monotonic()
    model.train()
    for step, (batch, frames) in zip(range(1, STEPS + 1), draw_batches(examples, generator), strict=False):
        features, labels = collate(batch, frames, end, generator)
        before = torch.cat([torch.full((len(batch), 1), start), labels[:, :-1]], dim=1)
        encoded = model.model.encoder(features).last_hidden_state
        hidden = model.model.decoder(
            input_ids=before.masked_fill(before < 0, end), encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        loss = nn.functional.cross_entropy(model.proj_out(hidden).transpose(1, 2), labels)
        spelled = nn.functional.ctc_loss(
            speller(encoded).log_softmax(-1).transpose(0, 1),
            labels[:, 1:].clamp(min=0),  # without no-timestamps
            torch.full((len(batch),), encoded.shape[1]),
            torch.tensor([len(example.tokens) - 2 for example in batch]),  # and without the end
            blank=end,
            zero_infinity=True,
        )
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + CTC_WEIGHT * spelled)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            taken = time.monotonic() - began
            left = taken / step * (STEPS - step)
            print(
                f"  step {step} of {STEPS}: loss {loss.item():.3f} and {spelled.item():.3f}, "
                f"{taken:.0f} s, {left:.0f} s left",
                flush=True,
            )
    model.eval()


def measure_wer(recognizer: Recognizer, utterances: Sequence[Utterance]) -> float:
    """Corpus word error rate, as a fraction."""
    heard = recognizer.transcribe([utterance.audio for utterance in utterances], max_batch=32)
    return float(jiwer.process_words([utterance.text for utterance in utterances], heard).wer)


def write_corpus(folder: Path, utterances: Sequence[Utterance]) -> None:
    """Writes 16-bit WAVs and transcripts.jsonl."""
    (folder / "audio").mkdir(parents=True)
    lines = []
    for index, utterance in enumerate(utterances):
        name = f"audio/{index:04d}.wav"
        soundfile.write(folder / name, utterance.audio, SAMPLE_RATE, subtype="PCM_16")
        group = utterance.text.replace(" ", "-")
        lines.append(json.dumps({"audio": name, "text": utterance.text, "speaker": utterance.speaker, "group": group}))
    (folder / "transcripts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_corpus(folder: Path) -> list[Utterance]:
    """Reads what ``write_corpus`` wrote."""
    rows = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        Utterance(
            row["text"],
            row["speaker"],
            soundfile.read(io.BytesIO((folder / row["audio"]).read_bytes()), dtype="float32")[0],
        )
        for row in rows
    ]


def cache_folder() -> Path:
    """The folder of everything that this version of the script made."""
    root = Path(os.environ.get("ATTUNE_CACHE") or Path.home() / ".cache" / "attune")
    return root / "mini" / _VERSION


@contextmanager
def _made_once(name: str) -> Iterator[tuple[Path, Path | None]]:
    """Gives the cached folder, and, where it is yet to be made, a folder to fill that then becomes it.

    Processes that ask at once wait for the one that makes it.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / name
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            yield target, None
            return
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            yield target, Path(scratch) / name
            (Path(scratch) / name).rename(target)


def ensure_mini_corpus(kind: CorpusKind) -> Path:
    """Returns a folder with WAVs and transcripts.jsonl, made on the first call.

    "old": 200 utterances of the voices that the model was trained on. "new-voices": 400 of twelve other speakers.
    No sentence is in both, none is there twice, and none was trained on.
    """
    with _made_once(f"corpus-{kind}") as (target, empty):
        if empty is not None:
            old = make_sentences(200, SEED + 1)
            if kind == "old":
                utterances = dev_utterances()
            else:
                sentences = make_sentences(400, SEED + 2, frozenset(old))
                utterances = speak_all(sentences, NEW_VOICES, SEED + 2, vary=False)
            write_corpus(empty, utterances)
    return target


def ensure_mini_model() -> Path:
    """Returns the model's folder, trained on the first call (about two minutes on two cores).

    Raises:
        RuntimeError: espeak-ng is missing, or the trained model is worse than it should be.
    """
    with _made_once("model") as (target, empty):
        if empty is not None:
            _train_into(empty)
    return target


def _train_into(folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    torch.manual_seed(SEED)
    began = time.monotonic()
    print(f"mini model: {TRAINING_UTTERANCES} utterances from espeak-ng", flush=True)
    held_out = frozenset(
        [*make_sentences(200, SEED + 1), *make_sentences(400, SEED + 2, frozenset(make_sentences(200, SEED + 1)))]
    )
    spoken = speak_all(make_sentences(TRAINING_UTTERANCES, SEED, held_out), OLD_VOICES, SEED, vary=True)
    tokenizer = make_tokenizer()
    examples = make_examples(spoken, tokenizer)
    seconds = sum(len(utterance.audio) for utterance in spoken) / SAMPLE_RATE
    print(f"  {seconds / 3600:.1f} h of speech, {time.monotonic() - began:.0f} s; training", flush=True)
    ids = tokenizer.get_vocab()
    model = make_model(ids)
    train(model, examples, ids[START], ids[END])
    folder.mkdir()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    write_artifact(folder, Artifact(padding=Padding.BUCKETS, buckets=BUCKETS))
    for path in folder.iterdir():
        path.chmod(0o644)
    dev = dev_utterances()
    wer = measure_wer(load_recognizer(folder, "cpu"), dev)
    print(f"  dev WER {wer:.1%}; {time.monotonic() - began:.0f} s in all", flush=True)
    if wer > MAX_DEV_WER:
        message = f"the mini model has {wer:.1%} dev WER, it should have at most {MAX_DEV_WER:.0%}"
        raise RuntimeError(message)


def main() -> None:
    """Makes everything, and says where it is."""
    model = ensure_mini_model()
    print(f"model: {model}")
    recognizer = load_recognizer(model, "cpu")
    kinds: tuple[CorpusKind, ...] = ("old", "new-voices")
    for kind in kinds:
        folder = ensure_mini_corpus(kind)
        utterances = read_corpus(folder)
        minutes = sum(len(utterance.audio) for utterance in utterances) / SAMPLE_RATE / 60
        wer = measure_wer(recognizer, utterances)
        print(f"corpus {kind}: {folder} ({len(utterances)} utterances, {minutes:.1f} min, WER of the model {wer:.1%})")


if __name__ == "__main__":
    main()
