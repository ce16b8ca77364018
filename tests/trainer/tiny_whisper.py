"""A Whisper of some ten thousand parameters with random weights and a vocabulary of characters."""

import string
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

CHARACTERS = [" ", "'", ".", *string.ascii_lowercase]
END, START = "<|endoftext|>", "<|startoftranscript|>"
LANGUAGES = ("<|de|>", "<|en|>")
TRANSCRIBE, NO_TIMESTAMPS = "<|transcribe|>", "<|notimestamps|>"


def build_tiny_whisper(
    folder: Path, *, multilingual: bool = False, window_seconds: int = 10, seed: int = 1, units: int = 32
) -> Path:
    """Saves a tiny Whisper; its end token is its padding token too, as with OpenAI's English models."""
    special = [
        END,
        START,
        *(LANGUAGES if multilingual else ()),
        *((TRANSCRIBE,) if multilingual else ()),
        NO_TIMESTAMPS,
    ]
    ids = {token: index for index, token in enumerate([*CHARACTERS, *special])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    config = WhisperConfig(
        vocab_size=len(ids) + 2,  # the last two are timestamps, as ids beyond the tokenizer's
        num_mel_bins=80,
        d_model=units,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * units,
        decoder_ffn_dim=2 * units,
        max_source_positions=50 * window_seconds,
        max_target_positions=96,
        pad_token_id=ids[END],
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        decoder_start_token_id=ids[START],
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.3,  # large enough for the random decoder to say something that depends on what it hears
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        bos_token_id=ids[END],
        decoder_start_token_id=ids[START],
        no_timestamps_token_id=ids[NO_TIMESTAMPS],
        is_multilingual=multilingual,
        max_length=96,
    )
    if multilingual:
        model.generation_config.lang_to_id = {token: ids[token] for token in LANGUAGES}
        model.generation_config.task_to_id = {"transcribe": ids[TRANSCRIBE]}
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=END).save_pretrained(
        folder
    )
    WhisperFeatureExtractor(feature_size=80, chunk_length=window_seconds).save_pretrained(folder)
    return folder
