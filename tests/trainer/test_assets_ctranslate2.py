"""Import of CTranslate2's format, against files written here from a random Whisper."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from attune_trainer.modeling.ctranslate2_import import CTranslate2FormatError, build_state, read_variables
from transformers import WhisperConfig, WhisperForConditionalGeneration

CODES = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}


def string(text: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def model_bin(
    variables: dict[str, np.ndarray], *, version: int = 6, spec: str = "WhisperSpec", tail: bytes = b""
) -> bytes:
    parts = [struct.pack("<I", version), string(spec), struct.pack("<II", 3, len(variables))]
    for name, values in variables.items():
        parts += [string(name), struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)]
        parts += [struct.pack("<BI", CODES[values.dtype.name], values.nbytes), values.tobytes()]
    parts += [struct.pack("<I", 1), string("decoder/projection/weight"), string("decoder/embeddings/weight"), tail]
    return b"".join(parts)


def to_ctranslate2(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """Stacks and renames a Whisper's state the way CTranslate2's converter does, at float16."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    out: dict[str, np.ndarray] = {}

    def linear(target: str, *names: str) -> None:
        weights = [state[f"model.{name}.weight"] for name in names]
        biases = [state.get(f"model.{n}.bias", np.zeros(len(w))) for n, w in zip(names, weights, strict=True)]
        out[f"{target}/weight"], out[f"{target}/bias"] = np.concatenate(weights), np.concatenate(biases)

    def norm(target: str, name: str) -> None:
        out[f"{target}/gamma"], out[f"{target}/beta"] = state[f"model.{name}.weight"], state[f"model.{name}.bias"]

    for side in ("encoder", "decoder"):
        out[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for layer in range(2):
            to, of = f"{side}/layer_{layer}", f"{side}.layers.{layer}"
            linear(f"{to}/self_attention/linear_0", *(f"{of}.self_attn.{part}_proj" for part in "qkv"))
            linear(f"{to}/self_attention/linear_1", f"{of}.self_attn.out_proj")
            norm(f"{to}/self_attention/layer_norm", f"{of}.self_attn_layer_norm")
            linear(f"{to}/ffn/linear_0", f"{of}.fc1")
            linear(f"{to}/ffn/linear_1", f"{of}.fc2")
            norm(f"{to}/ffn/layer_norm", f"{of}.final_layer_norm")
            if side == "decoder":
                linear(f"{to}/attention/linear_0", f"{of}.encoder_attn.q_proj")
                linear(f"{to}/attention/linear_1", f"{of}.encoder_attn.k_proj", f"{of}.encoder_attn.v_proj")
                linear(f"{to}/attention/linear_2", f"{of}.encoder_attn.out_proj")
                norm(f"{to}/attention/layer_norm", f"{of}.encoder_attn_layer_norm")
    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    out["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    halved = {name: values.astype(np.float16) for name, values in out.items()}
    return halved | {"decoder/scale_embeddings": np.array(0, np.int8), "encoder/num_heads": np.array(2, np.int16)}


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    torch.manual_seed(7)
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=40, d_model=16, max_source_positions=20, max_target_positions=12, **sizes, **heads, **ids
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # Random everywhere, so that no two tensors can be taken for each other; exact in float16.
            parameter.copy_(torch.randn_like(parameter).half().float())
    return model


def test_every_weight_comes_back_as_it_was(model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_bin(to_ctranslate2(model)))
    state = build_state(read_variables(path))
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.bin"
    path.write_bytes(data)
    return path


def test_a_truncated_file_is_refused_wherever_it_ends(model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    data = model_bin(to_ctranslate2(model))
    for length in (3, 20, 60, len(data) // 2, len(data) - 1):
        with pytest.raises(CTranslate2FormatError, match="truncated"):
            read_variables(write(tmp_path, data[:length]))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"version": 5}, "version 5"),
        ({"spec": "TransformerSpec"}, "TransformerSpec"),
        ({"tail": b"\0"}, "goes on after"),
    ],
)
def test_another_format_is_refused_by_name(
    model: WhisperForConditionalGeneration, tmp_path: Path, changed: dict[str, object], says: str
) -> None:
    with pytest.raises(CTranslate2FormatError, match=says):
        read_variables(write(tmp_path, model_bin(to_ctranslate2(model), **changed)))  # type: ignore[arg-type]


def test_quantised_weights_are_refused(model: WhisperForConditionalGeneration) -> None:
    variables = to_ctranslate2(model)
    variables["encoder/conv1/weight"] = variables["encoder/conv1/weight"].astype(np.int8)
    with pytest.raises(CTranslate2FormatError, match="quantised to int8"):
        build_state(variables)


def test_a_bias_on_the_keys_is_refused_and_not_dropped(model: WhisperForConditionalGeneration) -> None:
    variables = to_ctranslate2(model)
    variables["decoder/layer_1/attention/linear_1/bias"][3] = 0.5
    with pytest.raises(CTranslate2FormatError, match=r"decoder/layer_1/attention/linear_1 has a bias"):
        build_state(variables)


def test_a_missing_variable_is_named(model: WhisperForConditionalGeneration) -> None:
    variables = to_ctranslate2(model)
    del variables["decoder/layer_0/ffn/linear_0/weight"]
    with pytest.raises(CTranslate2FormatError, match="decoder/layer_0/ffn/linear_0/weight"):
        build_state(variables)
