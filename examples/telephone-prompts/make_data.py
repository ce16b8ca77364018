#!/usr/bin/env python3
"""Makes the example's data: recorded telephone prompts, heard over a noisy line, with their transcripts.

The speech is Debian's asterisk-core-sounds-en (a human speaker, 8 kHz). Each prompt gets pink noise at 10 dB and
is coded as mu-law, as an old telephone line would do it; --clean leaves the noise out. The result is a folder:

    audio/*.wav        8 kHz mu-law
    transcripts.jsonl  {"audio": "audio/hello.wav", "text": "Hello.", "speaker": "allison", "group": "hello"}
    LICENSE.txt        CC BY-SA 3.0, with whom to name

All prompts are one speaker's, so splits are made by "group", which holds sentences that are alike.
With --upload PREFIX the folder is copied to the store's bucket, named by ATTUNE_STORE_ENDPOINT, ATTUNE_STORE_BUCKET,
ATTUNE_STORE_REGION, ATTUNE_STORE_ACCESS_KEY and ATTUNE_STORE_SECRET_KEY.
"""

from __future__ import annotations

import argparse
import difflib
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
from shared import ProgressLine, cache_folder, upload

PACKAGES = ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en")
SAMPLE_RATE = 8000  # Hz
SPEAKER = "allison"
MAX_SECONDS = 29.4  # Whisper hears 30 s at most
SNR_DB = 10.0
BAND_HZ = (300.0, 3400.0)  # what a telephone line carries; noise below it would cost power and disturb nobody
LIKENESS = 0.8  # share of common words, in order, from which two sentences are alike
_RECIPE = 2  # raised when the same input gives other output, so that no old cache is taken for new
_SPOKEN_SIGNS = {"*": " star ", "#": " pound "}
_LICENCE = """\
Asterisk core sounds, English, recorded by Allison Smith (http://www.theivrvoice.com), (c) 2003-2010, with financial
contributions by Digium, Inc. Licence: Creative Commons Attribution-ShareAlike 3.0
(https://creativecommons.org/licenses/by-sa/3.0/).

Changed here: {change}. This changed copy is under the same licence.
"""


@dataclass(frozen=True)
class Prompt:
    """One recorded prompt: its name (a path without suffix) and what is said in it."""

    name: str
    text: str


@dataclass(frozen=True)
class Rejected:
    """How many listed prompts were not usable, and why."""

    without_audio: int
    not_speech: int
    too_long: int


@dataclass(frozen=True)
class Summary:
    """What was made."""

    folder: Path
    utterances: int
    groups: int
    minutes: float
    rejected: Rejected


def read_transcripts(lines: list[str]) -> list[Prompt]:
    """Reads ``name: text`` lines; comments (;) and blank lines are skipped.

    "conf-full: That conference is full." -> Prompt("conf-full", "That conference is full.")
    """
    prompts = []
    for line in lines:
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            prompts.append(Prompt(name.strip(), text.strip()))
    return prompts


def is_speech(text: str) -> bool:
    """Says whether a transcript is what is said and nothing else: brackets hold tones, silence and remarks."""
    return re.search(r"[\[\]()<>]", text) is None and re.search(r"\w", text) is not None


def clean_text(text: str) -> str:
    """Writes a transcript as it is spoken: signs as words, no dots of omission, single spaces.

    "... press * to go on" -> "press star to go on"
    """
    for sign, word in _SPOKEN_SIGNS.items():
        text = text.replace(sign, word)
    return " ".join(text.replace("...", " ").split())


def words_of(text: str) -> list[str]:
    """Splits a sentence into lower-case words without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def group_alike(texts: list[str], likeness: float = LIKENESS) -> list[int]:
    """Numbers the groups of sentences that are alike: two of them never get different numbers.

    Alike are two sentences with the same words, or whose words match in order to ``likeness`` (difflib's ratio: twice
    the common words over all words of both). Likeness is carried on: a ~ b and b ~ c put a, b and c together.
    """
    words = [words_of(text) for text in texts]
    leader = list(range(len(texts)))

    def find(item: int) -> int:
        while leader[item] != item:
            item = leader[item]
        return item

    for one, other in itertools.combinations(range(len(texts)), 2):
        first, second = words[one], words[other]
        # The ratio can't exceed this, and the comparison of all pairs is slow without the short cut.
        if 2 * min(len(first), len(second)) < likeness * (len(first) + len(second)) or find(one) == find(other):
            continue
        if first == second or difflib.SequenceMatcher(None, first, second, autojunk=False).ratio() >= likeness:
            leader[find(other)] = find(one)
    return [find(item) for item in range(len(texts))]


def make_pink_noise(samples: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draws noise within a telephone's band whose power falls as 1 / frequency, with mean square 1."""
    spectrum = np.fft.rfft(generator.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    inside = (frequency >= BAND_HZ[0]) & (frequency <= BAND_HZ[1])
    spectrum[~inside] = 0.0
    spectrum[inside] /= np.sqrt(frequency[inside])
    noise = np.fft.irfft(spectrum, samples)
    return np.asarray(noise / np.sqrt(np.mean(noise**2)), dtype=np.float64)


def add_noise(audio: npt.NDArray[np.float64], snr_db: float, seed: str) -> npt.NDArray[np.float64]:
    """Adds pink noise so that the clip's power is ``snr_db`` decibels above it; the same seed draws the same noise."""
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    level = np.sqrt(np.mean(audio**2) / 10 ** (snr_db / 10))
    noisy = audio + level * make_pink_noise(audio.size, generator)
    return np.asarray(noisy / max(1.0, float(np.max(np.abs(noisy)))), dtype=np.float64)


def fetch_packages(cache: Path) -> tuple[Path, Path]:
    """Downloads and unpacks the two Debian packages (nothing is installed); returns sounds folder and transcripts.

    Raises:
        SystemExit: apt-get or dpkg-deb is missing or fails.
    """
    unpacked = cache / "asterisk-core-sounds-en"
    if not unpacked.is_dir():
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                message = (
                    f"{tool} is missing: this machine is no Debian. Unpack {' and '.join(PACKAGES)} elsewhere "
                    "and name the parts with --sounds DIR --transcripts FILE"
                )
                raise SystemExit(message)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            # apt fetches as the user _apt, who must be able to write here.
            downloads = Path(scratch) / "downloads"
            downloads.mkdir()
            Path(scratch).chmod(0o755)
            downloads.chmod(0o777)
            print(f"downloading {' and '.join(PACKAGES)} (18 MB)", flush=True)
            run(["apt-get", "download", *PACKAGES], downloads)
            for archive in sorted(downloads.glob("*.deb")):
                run(["dpkg-deb", "-x", str(archive), str(Path(scratch) / "unpacked")], downloads)
            (Path(scratch) / "unpacked").rename(unpacked)
    sounds = sorted(unpacked.glob("usr/share/asterisk/sounds/en_US_*"))
    transcripts = sorted(unpacked.rglob("core-sounds-en.txt*"))
    if not sounds or not transcripts:
        message = f"{unpacked} does not hold the sounds and transcripts: remove it and try again"
        raise SystemExit(message)
    return sounds[0], transcripts[0]


def run(command: list[str], folder: Path) -> None:
    """Runs a command, and says its last words when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        message = f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}\n(apt-get update may help)"
        raise SystemExit(message)


def read_lines(transcripts: Path) -> list[str]:
    """Reads the lines of a text file, gzipped or not."""
    data = transcripts.read_bytes()
    return (gzip.decompress(data) if transcripts.suffix == ".gz" else data).decode("utf-8").splitlines()


def make_data(sounds: Path, transcripts: Path, target: Path, *, clean: bool, seed: int) -> Summary:
    """Writes audio, manifest and licence into ``target``; the same input and seed give the same bytes."""
    listed = read_transcripts(read_lines(transcripts))
    with_audio = [prompt for prompt in listed if (sounds / f"{prompt.name}.wav").is_file()]
    spoken = [prompt for prompt in with_audio if is_speech(prompt.text)]
    usable = [p for p in spoken if soundfile.info(sounds / f"{p.name}.wav").duration <= MAX_SECONDS]
    if not usable:
        message = f"{transcripts} names no prompt whose audio lies below {sounds}"
        raise SystemExit(message)
    texts = [clean_text(prompt.text) for prompt in usable]
    groups = group_alike(texts)
    shutil.rmtree(target, ignore_errors=True)
    (target / "audio").mkdir(parents=True)
    progress = ProgressLine("clean telephone line" if clean else "noisy telephone line", len(usable))
    lines, seconds = [], 0.0
    for number, (prompt, text, group) in enumerate(zip(usable, texts, groups, strict=True), start=1):
        audio, rate = soundfile.read(sounds / f"{prompt.name}.wav", dtype="float64")
        if rate != SAMPLE_RATE or audio.ndim != 1:
            message = f"{prompt.name}.wav has {rate} Hz and {audio.ndim} channels; {SAMPLE_RATE} Hz mono is expected"
            raise SystemExit(message)
        if not clean:
            audio = add_noise(audio, SNR_DB, f"{seed}:{prompt.name}")
        path = f"audio/{file_name(prompt.name)}.wav"
        soundfile.write(target / path, audio, rate, subtype="ULAW", format="WAV")
        group_name = file_name(usable[group].name)
        lines.append(json.dumps({"audio": path, "text": text, "speaker": SPEAKER, "group": group_name}))
        seconds += audio.size / rate
        progress.show(number)
    (target / "transcripts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    change = "mu-law coding" if clean else f"pink noise at {SNR_DB:g} dB, then mu-law coding"
    (target / "LICENSE.txt").write_text(_LICENCE.format(change=change), encoding="utf-8")
    rejected = Rejected(len(listed) - len(with_audio), len(with_audio) - len(spoken), len(spoken) - len(usable))
    return Summary(target, len(usable), len(set(groups)), seconds / 60, rejected)


def file_name(name: str) -> str:
    """Flattens a prompt's path: "digits/1" -> "digits-1"."""
    return name.replace("/", "-")


def ensure_data(
    *, clean: bool = False, seed: int = 7, sounds: Path | None = None, transcripts: Path | None = None
) -> Path:
    """Returns the folder with the prompts, made on the first call and taken from the cache ever after."""
    cache = cache_folder() / "telephone-prompts"
    cache.mkdir(parents=True, exist_ok=True)
    given = hashlib.sha256(f"{sounds and sounds.resolve()}".encode()).hexdigest()[:8] if sounds else "debian"
    target = cache / f"{given}-{'clean' if clean else f'noisy-{seed}'}-v{_RECIPE}"
    if not (target / "transcripts.jsonl").is_file():
        if sounds is None or transcripts is None:
            sounds, transcripts = fetch_packages(cache)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = make_data(sounds, transcripts, Path(scratch) / "data", clean=clean, seed=seed)
            print(
                f"{made.utterances} utterances, {made.minutes:.1f} minutes, {made.groups} groups of sentences alike; "
                f"left out: {made.rejected.without_audio} without audio, {made.rejected.not_speech} tones and remarks, "
                f"{made.rejected.too_long} longer than {MAX_SECONDS} s"
            )
            shutil.rmtree(target, ignore_errors=True)
            made.folder.rename(target)
    return target


def main() -> None:
    """Makes the data and, when asked to, uploads it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="leave the noise out (the mu-law coding stays)")
    parser.add_argument("--seed", type=int, default=7, help="seed of the noise (default 7)")
    parser.add_argument("--sounds", type=Path, help="folder with the prompts as WAV, instead of Debian's package")
    parser.add_argument("--transcripts", type=Path, help="file with 'name: text' lines, with --sounds")
    parser.add_argument("--upload", metavar="PREFIX", help="copy the folder to this prefix of the store's bucket")
    arguments = parser.parse_args()
    if (arguments.sounds is None) != (arguments.transcripts is None):
        parser.error("--sounds and --transcripts go together")
    folder = ensure_data(
        clean=arguments.clean, seed=arguments.seed, sounds=arguments.sounds, transcripts=arguments.transcripts
    )
    print(folder)
    if arguments.upload:
        print(upload(folder, arguments.upload))


if __name__ == "__main__":
    os.umask(0o022)
    main()
