"""Turns a Whisper model in CTranslate2's format into a transformers checkpoint folder.

Some packages carry Whisper only in CTranslate2's binary format, which can be served but not trained. The import is
exact: every weight is copied as it is, float16 widened to float32, and int8 refused, which has lost too much.

The format is described by ``python/ctranslate2/specs/model_spec.py`` of CTranslate2 (binary version 6): little-endian
numbers, strings as a 16-bit length (with the closing NUL counted) and bytes, variables as name, rank, dimensions, type,
byte count and data, and a list of aliases at the end.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

_BINARY_VERSION = 6
_SPEC_NAME = "WhisperSpec"
_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}
_MEL_FRAMES_PER_POSITION = 2
_MAX_INITIAL_TIMESTAMP_INDEX = 50
_ENGLISH_END = 50256  # the English vocabulary is GPT-2's; the multilingual one has one token more


class CTranslate2FormatError(ValueError):
    """The file is not a CTranslate2 Whisper model that can be imported; the message says why."""


@dataclass(frozen=True)
class ImportedModel:
    """What an import produced: the folder, and how many tensors and parameters were set."""

    folder: Path
    tensors: int
    parameters: int


class _Reader:
    """Reads CTranslate2's primitives from a byte buffer, refusing to run past its end."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def number(self, layout: str) -> int:
        return self.numbers(layout)[0]

    def string(self) -> str:
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode()

    def take(self, count: int) -> memoryview:
        if self._at + count > len(self._data):
            message = f"model.bin ends at byte {len(self._data)}, {count} more were announced: the file is truncated"
            raise CTranslate2FormatError(message)
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    @property
    def exhausted(self) -> bool:
        return self._at == len(self._data)


def read_variables(model_bin: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Reads every variable of a CTranslate2 Whisper ``model.bin``; aliases appear under their own names too.

    Raises:
        CTranslate2FormatError: another format version, another kind of model, a truncated or overlong file.
    """
    reader = _Reader(model_bin.read_bytes())
    version = reader.number("I")
    if version != _BINARY_VERSION:
        message = f"{model_bin.name} has binary version {version}; only version {_BINARY_VERSION} can be imported"
        raise CTranslate2FormatError(message)
    spec = reader.string()
    if spec != _SPEC_NAME:
        message = f"{model_bin.name} holds a {spec}, not a {_SPEC_NAME}"
        raise CTranslate2FormatError(message)
    reader.number("I")  # the spec's revision: changes in it only ever added variables
    variables: dict[str, np.ndarray[Any, Any]] = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        shape = reader.numbers("I" * reader.number("B"))
        code = reader.number("B")
        if code not in _DTYPES:
            message = f"{name} has type code {code}, which is not known"
            raise CTranslate2FormatError(message)
        data = reader.take(reader.number("I"))
        values = np.frombuffer(data, dtype=_DTYPES[code])
        if values.size != int(np.prod(shape, dtype=np.int64)):
            message = f"{name} has {values.size} values, its shape {shape} says otherwise"
            raise CTranslate2FormatError(message)
        variables[name] = values.reshape(shape)
    for _ in range(reader.number("I")):
        alias, target = reader.string(), reader.string()
        variables[alias] = variables[target]
    if not reader.exhausted:
        message = f"{model_bin.name} goes on after its last alias: it is not what its header says"
        raise CTranslate2FormatError(message)
    return variables


def build_state(variables: dict[str, np.ndarray[Any, Any]]) -> dict[str, torch.Tensor]:
    """Renames and unstacks CTranslate2's variables into transformers' Whisper state, all float32.

    ``self_attention/linear_0`` holds q, k, v by rows and ``attention/linear_1`` k, v; Whisper's k has no bias, so
    CTranslate2 stores zeros there, which is checked rather than trusted.

    Raises:
        CTranslate2FormatError: a variable is missing, quantised, or has a bias where Whisper has none.
    """
    try:
        return _Renaming(variables).run()
    except KeyError as error:
        message = f"the model lacks the variable {error.args[0]}, which every Whisper has"
        raise CTranslate2FormatError(message) from error


class _Renaming:
    """Carries variables over one by one; what it has so far is in ``state``."""

    def __init__(self, variables: dict[str, np.ndarray[Any, Any]]) -> None:
        self._variables = variables
        self.state: dict[str, torch.Tensor] = {}

    def run(self) -> dict[str, torch.Tensor]:
        for side in ("encoder", "decoder"):
            self.state[f"model.{side}.embed_positions.weight"] = self._tensor(f"{side}/position_encodings/encodings")
            self._norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
            for layer in range(count_layers(self._variables, side)):
                self._layer(f"{side}/layer_{layer}", f"model.{side}.layers.{layer}", crosses=side == "decoder")
        self._linear("encoder/conv1", "model.encoder.conv1")
        self._linear("encoder/conv2", "model.encoder.conv2")
        embeddings = self._tensor("decoder/embeddings/weight")
        self.state["model.decoder.embed_tokens.weight"] = embeddings
        self.state["proj_out.weight"] = embeddings
        return self.state

    def _layer(self, source: str, target: str, *, crosses: bool) -> None:
        self._stacked(f"{source}/self_attention/linear_0", f"{target}.self_attn", ("q_proj", "k_proj", "v_proj"))
        self._linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
        self._norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
        self._linear(f"{source}/ffn/linear_0", f"{target}.fc1")
        self._linear(f"{source}/ffn/linear_1", f"{target}.fc2")
        self._norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        if crosses:
            self._linear(f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj")
            self._stacked(f"{source}/attention/linear_1", f"{target}.encoder_attn", ("k_proj", "v_proj"))
            self._linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
            self._norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")

    def _tensor(self, name: str) -> torch.Tensor:
        values = self._variables[name]
        if values.dtype.kind != "f":
            message = f"{name} is quantised to {values.dtype.name}; import a float16 or float32 model instead"
            raise CTranslate2FormatError(message)
        return torch.from_numpy(values.astype(np.float32))

    def _linear(self, source: str, target: str) -> None:
        self.state[f"{target}.weight"] = self._tensor(f"{source}/weight")
        self.state[f"{target}.bias"] = self._tensor(f"{source}/bias")

    def _norm(self, source: str, target: str) -> None:
        self.state[f"{target}.weight"] = self._tensor(f"{source}/gamma")
        self.state[f"{target}.bias"] = self._tensor(f"{source}/beta")

    def _stacked(self, source: str, target: str, parts: tuple[str, ...]) -> None:
        weights = self._tensor(f"{source}/weight").chunk(len(parts))
        biases = self._tensor(f"{source}/bias").chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            self.state[f"{target}.{part}.weight"] = weight.clone()
            if part != "k_proj":
                self.state[f"{target}.{part}.bias"] = bias.clone()
            elif bias.abs().max() > 0:
                message = f"{source} has a bias on its keys, which Whisper does not have"
                raise CTranslate2FormatError(message)


def count_layers(variables: dict[str, np.ndarray[Any, Any]], side: str) -> int:
    """Counts the layers of ``encoder`` or ``decoder``."""
    layers = {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")}
    return len(layers - {"layer_norm"})


def build_tokenizer(source: Path) -> WhisperTokenizerFast:
    """Builds the tokenizer; what only ``vocabulary.txt`` has (the 1,501 timestamps) is added as special tokens."""
    tokens = (source / "vocabulary.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    known = tokenizer.get_vocab_size(with_added_tokens=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[known:]])
    ids = tokenizer.get_vocab(with_added_tokens=True)
    misplaced = [token for place, token in enumerate(tokens) if place >= known and ids.get(token) != place]
    if misplaced or len(ids) != len(tokens):
        message = f"tokenizer.json and vocabulary.txt disagree on {len(misplaced) or len(ids) - len(tokens)} tokens"
        raise CTranslate2FormatError(message)
    end = "<|endoftext|>"
    return WhisperTokenizerFast(tokenizer_object=tokenizer, unk_token=end, bos_token=end, eos_token=end, pad_token=end)


def import_model(source: Path, target: Path) -> ImportedModel:
    """Writes the CTranslate2 Whisper model in ``source`` as a transformers checkpoint folder ``target``.

    ``source`` holds model.bin, config.json, tokenizer.json and vocabulary.txt. The folder written loads with
    ``from_pretrained(target, local_files_only=True)``: config, float32 safetensors, tokenizer, feature extractor and
    generation config (an English-only model gets no language, no task and no forced ids).

    Raises:
        CTranslate2FormatError: the source is not such a model, or a parameter would be left without a value.
    """
    variables = read_variables(source / "model.bin")
    state = build_state(variables)
    tokenizer = build_tokenizer(source)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    ids = tokenizer.get_vocab()
    if ids["<|endoftext|>"] != _ENGLISH_END:
        message = "the vocabulary is not that of an English-only Whisper; fetch the multilingual model as safetensors"
        raise CTranslate2FormatError(message)
    start, end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
    width = state["model.decoder.embed_tokens.weight"].shape[1]
    config = WhisperConfig(
        vocab_size=state["model.decoder.embed_tokens.weight"].shape[0],
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        d_model=width,
        encoder_layers=count_layers(variables, "encoder"),
        decoder_layers=count_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=state["model.encoder.layers.0.fc1.weight"].shape[0],
        decoder_ffn_dim=state["model.decoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=state["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=state["model.decoder.embed_positions.weight"].shape[0],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )
    model = WhisperForConditionalGeneration(config)
    loaded = model.load_state_dict(state, strict=False)
    if loaded.missing_keys or loaded.unexpected_keys:
        message = (
            f"parameters without a value: {loaded.missing_keys}; values without a parameter: {loaded.unexpected_keys}"
        )
        raise CTranslate2FormatError(message)
    model.generation_config = GenerationConfig(
        alignment_heads=settings["alignment_heads"],
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        prev_sot_token_id=ids["<|startofprev|>"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        max_initial_timestamp_index=_MAX_INITIAL_TIMESTAMP_INDEX,
        max_length=config.max_target_positions,
        is_multilingual=False,
        return_timestamps=False,
    )
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    features = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    if features.nb_max_frames != _MEL_FRAMES_PER_POSITION * config.max_source_positions:
        message = f"{config.max_source_positions} encoder positions do not make 30 s"
        raise CTranslate2FormatError(message)
    features.save_pretrained(target)
    return ImportedModel(folder=target, tensors=len(state), parameters=sum(p.numel() for p in model.parameters()))
