"""One model of each family, of some ten thousand parameters with random weights, and a vocabulary of characters."""

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    HubertConfig,
    HubertForCTC,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen3ASRConfig,
    Qwen3ASRFeatureExtractor,
    Qwen3ASRForConditionalGeneration,
    Qwen3ASRProcessor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
    WhisperFeatureExtractor,
)

from tests.trainer.tiny_whisper import build_tiny_whisper

LETTER_SECONDS: Final = 0.2
PAD, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
CHARACTERS: Final = [" ", "'", *string.ascii_lowercase]
_UNITS: Final = 48


def speak(text: str, seed: int = 0) -> npt.NDArray[np.float32]:
    """Gives every letter a tone of its own, long enough for a frame of each model and a blank."""
    draw = np.random.default_rng(seed)
    at = np.arange(int(LETTER_SECONDS * 16000)) / 16000
    tones = [np.sin(2 * np.pi * (200 + 100 * (ord(letter) - 96)) * at) * (letter != " ") for letter in text]
    sound = np.concatenate(tones) * 0.3
    return (sound + draw.standard_normal(len(sound)) * 0.01).astype(np.float32)


def _characters(special: list[str], characters: Sequence[str], **roles: Any) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of special tokens, with the first ids, and characters."""
    ids = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, **roles)


def _build_wav2vec2(network: Any, config: Any, folder: Path, *, norm: str, letters: str) -> Path:
    """Saves a model that hears frames of 20 ms, by three convolutions instead of seven."""
    vocabulary = {token: index for index, token in enumerate([PAD, START, END, UNKNOWN, "|", "'", *letters])}
    shape = config(
        vocab_size=len(vocabulary),
        hidden_size=_UNITS,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * _UNITS,
        conv_dim=[32, 32, 32],
        conv_kernel=[10, 8, 8],
        conv_stride=[5, 8, 8],
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        final_dropout=0.0,
        pad_token_id=0,
        initializer_range=0.1,
    )
    torch.manual_seed(1)
    network(shape).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm == "layer").save_pretrained(folder)
    return folder


def build_wav2vec2(folder: Path, letters: str = string.ascii_uppercase) -> Path:
    """Saves a wav2vec 2.0 like the base model: normalised over the whole clip, and a vocabulary of capitals."""
    return _build_wav2vec2(Wav2Vec2ForCTC, Wav2Vec2Config, folder, norm="group", letters=letters)


def build_hubert(folder: Path) -> Path:
    """Saves a HuBERT like the large model: normalised frame by frame."""
    return _build_wav2vec2(HubertForCTC, HubertConfig, folder, norm="layer", letters=string.ascii_lowercase)


def build_wavlm(folder: Path) -> Path:
    """Saves a WavLM like the base model."""
    return _build_wav2vec2(WavLMForCTC, WavLMConfig, folder, norm="group", letters=string.ascii_lowercase)


def build_parakeet(folder: Path) -> Path:
    """Saves a Parakeet that hears frames of 80 ms."""
    tokenizer = _characters([UNKNOWN, PAD], CHARACTERS, pad_token=PAD)
    encoder = ParakeetEncoderConfig(
        hidden_size=_UNITS,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * _UNITS,
        subsampling_conv_channels=16,
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.1,
    )
    config = ParakeetCTCConfig(
        vocab_size=len(tokenizer), encoder_config=encoder.to_dict(), pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(1)
    ParakeetForCTC(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ParakeetFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


def build_moonshine(folder: Path) -> Path:
    """Saves a Moonshine with room for 60 tokens."""
    tokenizer = _characters([UNKNOWN, START, END], CHARACTERS, bos_token=START, eos_token=END, pad_token=END)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "decoder_start_token_id": 1}
    config = MoonshineConfig(
        vocab_size=len(tokenizer),
        hidden_size=_UNITS,
        intermediate_size=2 * _UNITS,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        max_position_embeddings=60,
        initializer_range=0.1,
        **ids,
    )
    torch.manual_seed(1)
    model = MoonshineForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_length=60, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}<|audio_start|><|AUDIO|><|audio_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _chat_tokenizer(*more: str, own: dict[str, str]) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of all that a chat template writes."""
    special = [UNKNOWN, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", *more]
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _characters(special, [*string.printable], **roles, extra_special_tokens=own)


def _build_audio_llm(network: Any, config: Any, processor: Any, folder: Path) -> Path:
    """Saves a model that closes its turn with the second of two ends."""
    ids = processor.tokenizer.get_vocab()
    torch.manual_seed(1)
    model = network(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|endoftext|>"], ids["<|im_end|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _language_model(model_type: str, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": _UNITS,
        "intermediate_size": 2 * _UNITS,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        **more,
    }


def build_qwen2_audio(folder: Path) -> Path:
    """Saves a Qwen2-Audio with a window of 10 s."""
    tokenizer = _chat_tokenizer("<|audio_bos|>", "<|audio_eos|>", own={"audio_token": "<|AUDIO|>"})
    encoder = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 80,
        "d_model": _UNITS,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * _UNITS,
        "max_source_positions": 500,
        "initializer_range": 0.1,
    }
    config = Qwen2AudioConfig(
        audio_config=encoder,
        text_config=_language_model("qwen2", len(tokenizer)),
        audio_token_index=tokenizer.get_vocab()["<|AUDIO|>"],
    )
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=10)
    processor = Qwen2AudioProcessor(extractor, tokenizer)
    return _build_audio_llm(Qwen2AudioForConditionalGeneration, config, processor, folder)


def build_qwen3_asr(folder: Path) -> Path:
    """Saves a Qwen3-ASR."""
    own = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokenizer = _chat_tokenizer("<|audio_start|>", "<|audio_end|>", "<asr_text>", own=own)
    encoder = {
        "model_type": "qwen3_asr_encoder",
        "num_mel_bins": 80,
        "d_model": _UNITS,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * _UNITS,
        "output_dim": _UNITS,
        "downsample_hidden_size": 16,
        "initializer_range": 0.1,
    }
    ids = tokenizer.get_vocab()
    config = Qwen3ASRConfig(
        audio_config=encoder,
        text_config=_language_model("qwen3", len(tokenizer), head_dim=_UNITS // 2),
        audio_token_id=ids["<|AUDIO|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|endoftext|>"], ids["<|im_end|>"]],
    )
    processor = Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(feature_size=80), tokenizer, chat_template=_TEMPLATE)
    return _build_audio_llm(Qwen3ASRForConditionalGeneration, config, processor, folder)


BUILDERS: Final[dict[str, Callable[[Path], Path]]] = {
    "whisper": build_tiny_whisper,
    "moonshine": build_moonshine,
    "wav2vec2": build_wav2vec2,
    "hubert": build_hubert,
    "wavlm": build_wavlm,
    "parakeet_ctc": build_parakeet,
    "qwen2_audio": build_qwen2_audio,
    "qwen3_asr": build_qwen3_asr,
}
