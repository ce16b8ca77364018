import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
import torch
from attune.contract.exitcode import ExitCode
from attune.contract.job import FinetuneRecipe
from attune.contract.training import (
    Augmentation,
    Checkpointing,
    Distributed,
    EarlyStopping,
    Hyperparameters,
    Lora,
    LoraVariant,
    Method,
    Padding,
    Precision,
)
from attune_trainer.augmentation.augmenter import Augmenter
from attune_trainer.failures import InvalidInput, OutOfMemory, RecipeFailure, StoreUnavailable
from attune_trainer.job import RecipeContext
from attune_trainer.modeling import load_recognizer
from attune_trainer.modeling.buckets import BUCKETS
from attune_trainer.modeling.speech_model import IGNORED, TokenBatch
from attune_trainer.modeling.whisper import Whisper, load_whisper
from attune_trainer.recipes import finetune
from attune_trainer.store import Store, digest_directory
from attune_trainer.training import checkpoints
from attune_trainer.training.adapters import Adapters
from attune_trainer.training.arithmetic import choose_dtype
from attune_trainer.training.batches import Batch, plan_epoch
from attune_trainer.training.checkpoints import TrainingState
from attune_trainer.training.events import EventReader, EventWriter, _cut
from attune_trainer.training.export import clean_generation, describe_artifact
from attune_trainer.training.full import AllWeights
from attune_trainer.training.launch import _check_exit_status, _environment, count_gpus, has_killed_child
from attune_trainer.training.loader import BatchLoader, TrainingBatch, read_samples
from attune_trainer.training.memory import explain_exhausted
from attune_trainer.training.methods import TrainingMethod, choose_method, load_state, save_state
from attune_trainer.training.objective import TranscriptionLoss
from attune_trainer.training.quantised import QuantisedAdapters
from attune_trainer.training.schedule import learning_rate_factor
from attune_trainer.training.selection import judge_epoch
from attune_trainer.training.settings import ADAPTER_FOLDER, MODEL_FOLDER, TrainingSettings, TrainingUtterance
from attune_trainer.training.transcripts import TranscriptEncoder, select_usable
from attune_trainer.training.weights import trained_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import normalizers
from transformers import WhisperForConditionalGeneration

from tests.trainer.server_process import wait_until
from tests.trainer.tiny_whisper import build_tiny_whisper


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_whisper(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def whisper(tiny: Path) -> Whisper:
    return load_whisper(tiny)


durations = st.lists(st.floats(0.1, 30), min_size=1, max_size=80)


class TestBatches:
    @settings(max_examples=200)
    @given(durations, st.integers(1, 20), st.integers(1, 120), st.integers(0, 3), st.integers(1, 4))
    def test_every_utterance_is_used_once_within_the_bounds(
        self, seconds: list[float], size: int, room: int, epoch: int, processes: int
    ) -> None:
        steps = plan_epoch(
            seconds, BUCKETS, batch_size=size, max_batch_seconds=room, seed=7, epoch=epoch, processes=processes
        )
        assert all(len(step) == processes for step in steps)
        batches = list({batch: None for step in steps for batch in step})  # a repeated one is the same object's equal
        assert sorted(index for batch in batches for index in batch.members) == list(range(len(seconds)))
        for batch in batches:
            assert batch.bucket in BUCKETS
            assert len(batch.members) <= size
            assert len(batch.members) == 1 or len(batch.members) * batch.bucket <= room
            assert all(seconds[index] + 0.5 <= batch.bucket or batch.bucket == 30 for index in batch.members)

    def test_three_tenths_of_the_batches_are_padded_one_bucket_up(self) -> None:
        steps = plan_epoch([2.4] * 4000, BUCKETS, batch_size=4, max_batch_seconds=48, seed=7, epoch=0)
        share = sum(batch.bucket == 4 for (batch,) in steps) / len(steps)
        assert {batch.bucket for (batch,) in steps} == {3, 4}
        assert 0.25 < share < 0.35

    def test_padded_to_one_window_a_batch_is_bounded_by_its_audio_alone(self) -> None:
        steps = plan_epoch([3.0] * 40, (30.0,), batch_size=16, max_batch_seconds=30, seed=7, epoch=0)
        assert [len(batch.members) for (batch,) in steps] == [10] * 4
        assert {batch.bucket for (batch,) in steps} == {30.0}

    def test_a_plan_depends_on_seed_and_epoch_alone(self) -> None:
        seconds = np.random.default_rng(0).uniform(0.3, 20, 100).tolist()

        def plan(seed: int, epoch: int) -> list[tuple[Batch, ...]]:
            return plan_epoch(seconds, BUCKETS, batch_size=8, max_batch_seconds=48, seed=seed, epoch=epoch)

        assert plan(7, 2) == plan(7, 2)
        assert plan(7, 2) != plan(7, 3)
        assert plan(7, 2) != plan(8, 2)


class TestSchedule:
    def test_rises_to_the_peak_and_falls_to_a_twentieth(self) -> None:
        factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
        assert factors[0] == pytest.approx(0.1)
        assert factors[9] == 1.0
        assert factors[99] == pytest.approx(0.05)
        assert factors[:10] == sorted(factors[:10])
        assert factors[9:] == sorted(factors[9:], reverse=True)

    def test_without_warm_up_it_only_falls(self) -> None:
        factors = [learning_rate_factor(step, 10, 0.0) for step in range(10)]
        assert factors == sorted(factors, reverse=True)
        assert factors[-1] == pytest.approx(0.05)

    def test_a_run_of_warm_up_alone_ends_at_the_peak(self) -> None:
        assert learning_rate_factor(9, 10, 1.0) == 1.0


class TestTranscripts:
    def test_the_end_is_learned_though_it_pads_as_well(self, whisper: Whisper) -> None:
        assert whisper.config.pad_token_id == whisper.end
        encoder = TranscriptEncoder(whisper, "en")
        short, long = encoder.encode("ab"), encoder.encode("abcdef")
        assert short is not None
        assert long is not None
        batch = encoder.batch([short, long])
        assert batch.targets[0].tolist() == [IGNORED, *short, whisper.end, *[IGNORED] * 4]
        assert batch.targets[1].tolist() == [IGNORED, *long, whisper.end]

    def test_the_decoder_reads_the_prompt_and_is_never_to_say_it(self, whisper: Whisper) -> None:
        encoder = TranscriptEncoder(whisper, "en")
        ids = encoder.encode("ab")
        assert ids is not None
        batch = encoder.batch([ids])
        assert batch.inputs[0].tolist() == [*whisper.prompt(), *ids]
        assert not set(whisper.prompt()) & set(batch.targets[0].tolist())

    def test_a_transcript_that_the_decoder_has_no_room_for_is_told_apart(self, whisper: Whisper) -> None:
        encoder = TranscriptEncoder(whisper, "en")
        room = whisper.config.max_target_positions - len(whisper.prompt())
        assert encoder.encode("a" * room) is not None
        assert encoder.encode("a" * (room + 1)) is None

    def test_a_multilingual_model_is_trained_with_the_language_it_is_served_with(self, tmp_path: Path) -> None:
        whisper = load_whisper(build_tiny_whisper(tmp_path, multilingual=True))
        encoder = TranscriptEncoder(whisper, "de-AT")
        assert encoder.language == "de"
        assert encoder.batch([[3]]).inputs[0].tolist() == [*whisper.prompt(whisper.languages()["de"]), 3]
        with pytest.raises(InvalidInput, match=r"language fi.*de, en"):
            TranscriptEncoder(whisper, "fi")


class TestUsable:
    def utterance(self, text: str, seconds: float = 1.0) -> TrainingUtterance:
        return TrainingUtterance(audio=Path("a.wav"), text=text, seconds=seconds)

    def select(self, whisper: Whisper, *utterances: TrainingUtterance) -> tuple[TrainingUtterance, ...]:
        return select_usable(utterances, TranscriptEncoder(whisper, "en"), whisper)

    def test_a_few_that_the_model_cannot_take_are_left_out(self, whisper: Whisper) -> None:
        good = [self.utterance("yes")] * 38
        assert self.select(whisper, *good, self.utterance("yes", 11), self.utterance("9 to 5")) == tuple(good)

    @pytest.mark.parametrize("share", [5, 40], ids=["many", "all, so that no epoch would have a step"])
    def test_many_that_are_too_long_are_a_mistake_in_the_data(self, whisper: Whisper, share: int) -> None:
        long = [self.utterance("yes", 11), self.utterance("a" * 97)] * (share // 2) + [self.utterance("no", 11)]
        good = [self.utterance("yes")] * (40 - share)
        with pytest.raises(
            InvalidInput, match=r"utterances are longer than the model's window of 10 s.*96 tokens"
        ) as raised:
            self.select(whisper, *good, *long)
        assert raised.value.reason == "UtterancesTooLong"

    def test_characters_that_the_vocabulary_lacks_are_named_and_no_transcript_is(self, whisper: Whisper) -> None:
        good = [self.utterance("yes")] * 30
        bad = [self.utterance("caf\xe9 no 5"), self.utterance("Eve")] * 5
        with pytest.raises(
            InvalidInput, match=r"10 of 40 training transcripts have characters.*\(5 E \xe9\)"
        ) as raised:
            self.select(whisper, *good, *bad)
        assert raised.value.reason == "UnknownCharacters"
        assert "caf" not in raised.value.message

    def test_case_and_form_of_letters_are_the_tokenizers_affair(self, tiny: Path) -> None:
        whisper = load_whisper(tiny)
        whisper.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        assert TranscriptEncoder(whisper, "en").lost("Yes  No") == set()

    def test_a_marker_that_is_written_out_in_a_transcript_does_not_become_a_token(self, whisper: Whisper) -> None:
        assert TranscriptEncoder(whisper, "en").lost("yes<|endoftext|>") == set("<|>")

    def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(self, whisper: Whisper) -> None:
        whisper.tokenizer.add_tokens(["\xe4", "\xf6", "\xfc"])
        encoder = TranscriptEncoder(whisper, "en")
        assert encoder.encode("yes") is not None
        with pytest.raises(
            InvalidInput, match=r"token 3\d, but its network knows only 34; upload the tokenizer"
        ) as raised:
            encoder.encode("\xfc")
        assert raised.value.reason == "TokenizerMismatch"


class TestLoss:
    def test_it_is_transformers_own_loss_with_the_prompt_left_out(self, tiny: Path, whisper: Whisper) -> None:
        encoder = TranscriptEncoder(whisper, "en")
        transcripts = [ids for text in ("press one", "stop") if (ids := encoder.encode(text))]
        tokens = encoder.batch(transcripts)
        clips = [np.random.default_rng(seed).standard_normal(16000).astype(np.float32) for seed in range(2)]
        features = whisper.features(clips, whisper.window_seconds)
        original = WhisperForConditionalGeneration.from_pretrained(tiny).eval()
        with torch.inference_mode():
            expected = original(input_features=features, decoder_input_ids=tokens.inputs, labels=tokens.targets).loss
            lengths = whisper.lengths(clips, whisper.window_seconds)
            found = TranscriptionLoss(whisper.model, whisper)(features, tokens.inputs, tokens.targets, lengths)
        torch.testing.assert_close(found, expected)


HOST = torch.device("cpu")
# Each way of training, and how its weights are moved by hand: every one of them counts, none drowns the others.
METHODS: dict[str, tuple[Callable[[], TrainingMethod], float]] = {
    "Standard": (lambda: Adapters(Lora(rank=4)), 0.1),
    "RsLora": (lambda: Adapters(Lora(rank=4, variant=LoraVariant.RSLORA)), 0.1),
    "Dora": (lambda: Adapters(Lora(rank=4, variant=LoraVariant.DORA)), 0.1),
    "SomeLayers": (lambda: Adapters(Lora(rank=4, target_modules=["q_proj", "fc2"])), 0.1),
    "QLora": (lambda: QuantisedAdapters(Lora(rank=4), HOST), 0.1),
    "QDora": (lambda: QuantisedAdapters(Lora(rank=4, variant=LoraVariant.DORA), HOST), 0.1),
    "Full": (AllWeights, 0.02),
}


def move(model: torch.nn.Module, size: float) -> None:
    """Does to the weights what training would: none of them stays where it was."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=size)


def logits(whisper: Whisper) -> torch.Tensor:
    features = whisper.features([np.sin(np.arange(8000, dtype=np.float32))], 2.0)
    with torch.inference_mode():
        found: torch.Tensor = whisper.model(
            input_features=features, decoder_input_ids=torch.tensor([whisper.prompt()])
        ).logits
    return found


class TestMethods:
    def test_all_linear_layers_of_encoder_and_decoder_are_adapted_and_nothing_else_trains(
        self, whisper: Whisper
    ) -> None:
        trainable = set(trained_parameters(Adapters(Lora(rank=4)).attach(whisper)))
        assert all("lora_" in name for name in trainable)
        # 2 layers: 4 attention and 2 feed-forward in the encoder; twice the attention in the decoder; A and B each.
        assert len(trainable) == 2 * (2 * (4 + 2) + 2 * (8 + 2))

    def test_only_the_layers_that_are_named_are_adapted(self, whisper: Whisper) -> None:
        model = Adapters(Lora(rank=4, target_modules=["v_proj", "fc1"])).attach(whisper)
        trainable = set(trained_parameters(model))
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable} == {"v_proj", "fc1"}
        assert len(trainable) == 2 * (2 * 2 + 2 * 3)

    def test_of_all_weights_only_the_sinusoids_do_not_train(self, whisper: Whisper) -> None:
        trainable = set(trained_parameters(AllWeights().attach(whisper)))
        frozen = {name for name, _ in whisper.model.named_parameters()} - trainable
        assert frozen == {"model.encoder.embed_positions.weight"}

    def test_a_layer_that_the_model_does_not_have_is_refused_with_those_that_it_has(self, whisper: Whisper) -> None:
        with pytest.raises(InvalidInput, match=r"targetModules names query, which.*q_proj, k_proj.*fc2") as raised:
            Adapters(Lora(rank=4, target_modules=["q_proj", "query"])).attach(whisper)
        assert raised.value.reason == "UnknownTargetModule"

    def test_a_rank_beyond_the_narrowest_layer_is_refused_with_the_bound(self, whisper: Whisper) -> None:
        with pytest.raises(InvalidInput, match=r"rank is 33.*32"):
            Adapters(Lora(rank=33)).attach(whisper)

    @pytest.mark.parametrize(("variant", "scale"), [(None, 2), ("Standard", 2), ("Dora", 2), ("RsLora", math.sqrt(16))])
    def test_updates_are_scaled_as_the_variant_says(self, whisper: Whisper, variant: str | None, scale: float) -> None:
        lora = Lora(rank=4, alpha=8, variant=variant and LoraVariant(variant))
        model = Adapters(lora).attach(whisper)
        assert model.base_model.model.model.encoder.layers[0].fc1.scaling["default"] == pytest.approx(scale)

    @pytest.mark.parametrize("name", METHODS)
    def test_what_is_written_computes_what_was_trained_and_so_does_what_is_loaded_again(
        self, tiny: Path, whisper: Whisper, tmp_path: Path, name: str
    ) -> None:
        make, size = METHODS[name]
        untuned = logits(whisper)
        method = make()
        model = method.attach(whisper)
        clean_generation(whisper)
        move(model.eval(), size)
        trained = logits(whisper)
        assert not torch.allclose(untuned, trained, atol=1e-2)
        save_state(method.state(model), tmp_path / "best.safetensors")
        padding = Padding.BUCKETS
        artifact = describe_artifact(
            whisper, padding, base_uri="s3://models/tiny", model_id="ft:tiny:abcdef", language=None
        )
        method.export(model, whisper, tmp_path / "one", base=tiny, artifact=artifact)
        merged = tmp_path / "one" / MODEL_FOLDER
        torch.testing.assert_close(logits(load_whisper(merged)), trained, atol=1e-4, rtol=1e-4)
        # In another process, from what was saved.
        again = load_whisper(tiny)
        model = method.attach(again).eval()
        method.load(model, load_state(tmp_path / "best.safetensors"))
        torch.testing.assert_close(logits(again), trained, atol=1e-5, rtol=1e-5)
        clean_generation(again)
        method.export(model, again, tmp_path / "two", base=tiny, artifact=artifact)
        assert digest_directory(tmp_path / "one") == digest_directory(tmp_path / "two")
        # The folder is anybody's: transformers alone loads it too.
        WhisperForConditionalGeneration.from_pretrained(merged)
        assert load_recognizer(merged, "cpu").padding is padding
        config = json.loads((merged / "config.json").read_text())
        assert config["architectures"] == ["WhisperForConditionalGeneration"]
        assert "quantization_config" not in config

    def test_dropout_acts_in_training_alone_and_is_not_saved(self, whisper: Whisper) -> None:
        features = whisper.features([np.ones(8000, np.float32)], 2.0)
        inputs = torch.tensor([whisper.prompt()])

        def logits() -> torch.Tensor:
            with torch.inference_mode():
                found: torch.Tensor = whisper.model(input_features=features, decoder_input_ids=inputs).logits
                return found

        whisper.model.train()
        before = logits()
        assert torch.equal(logits(), before)  # this base has no dropout of its own
        whisper.set_dropout(0.3)
        assert not torch.equal(logits(), logits())
        # Hidden states of encoder, decoder and their 4 layers, activations of these, 6 attentions.
        rates = [
            getattr(module, name)
            for module in whisper.model.modules()
            for name in ("dropout", "activation_dropout")
            if hasattr(module, name)
        ]
        assert rates == [0.3] * (2 + 4 + 4 + 6)
        whisper.model.eval()
        assert torch.equal(logits(), before)
        assert whisper.config.dropout == whisper.config.attention_dropout == whisper.config.activation_dropout == 0
        whisper.set_dropout(0)
        whisper.model.train()
        assert torch.equal(logits(), before)

    @pytest.mark.parametrize("name", ["Standard", "Dora", "QLora"])
    def test_an_adapter_is_published_with_the_shapes_of_its_layers(
        self, tiny: Path, whisper: Whisper, tmp_path: Path, name: str
    ) -> None:
        method = METHODS[name][0]()
        model = method.attach(whisper)
        move(model, 0.1)
        artifact = describe_artifact(whisper, Padding.WINDOW, base_uri="s3://a/b", model_id="m", language=None)
        method.export(model, whisper, tmp_path, base=tiny, artifact=artifact)
        adapter = tmp_path / ADAPTER_FOLDER
        weights = load_file(adapter / "adapter_model.safetensors")
        layers = dict(load_whisper(tiny).model.named_modules())
        for key, value in weights.items():
            layer, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
            units = layers[layer].weight.shape
            expected = {"A.weight": (4, units[1]), "B.weight": (units[0], 4), "magnitude_vector": (units[0],)}[kind]
            assert tuple(value.shape) == expected, key
            assert value.abs().max() > 0, key
        assert ("magnitude_vector" in " ".join(weights)) == (name == "Dora")
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "s3://a/b"
        assert config["target_modules"] == sorted(config["target_modules"])

    def test_all_weights_leave_no_adapter(self, tiny: Path, whisper: Whisper, tmp_path: Path) -> None:
        artifact = describe_artifact(whisper, Padding.WINDOW, base_uri="s3://a/b", model_id="m", language=None)
        method = AllWeights()
        method.export(method.attach(whisper), whisper, tmp_path, base=tiny, artifact=artifact)
        assert [folder.name for folder in tmp_path.iterdir()] == [MODEL_FOLDER]

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (Adapters(Lora(rank=4)), Adapters(Lora(rank=8))),
            (Adapters(Lora(rank=4)), Adapters(Lora(rank=4, target_modules=["fc1"]))),
            (Adapters(Lora(rank=4)), AllWeights()),
        ],
    )
    def test_weights_of_another_shape_are_not_taken(
        self, tiny: Path, whisper: Whisper, one: TrainingMethod, other: TrainingMethod
    ) -> None:
        state = one.state(one.attach(whisper))
        with pytest.raises(ValueError, match="differs"):
            other.load(other.attach(load_whisper(tiny)), state)

    def test_weights_of_4_bits_take_an_eighth_of_the_memory(self, whisper: Whisper) -> None:
        method = QuantisedAdapters(Lora(rank=4), HOST)
        method.attach(whisper)
        layer = whisper.model.model.decoder.layers[1].fc1.base_layer
        assert layer.weight.numel() * layer.weight.element_size() == layer.in_features * layer.out_features / 2
        assert {parameter.dtype for parameter in trained_parameters(whisper.model).values()} == {torch.float32}

    @pytest.mark.parametrize("fault", ["no package", "no device"])
    def test_4_bits_that_image_or_device_cannot_do_are_refused_with_what_to_change(
        self, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        device = HOST
        if fault == "no package":
            monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        else:
            device = torch.device("cuda", torch.cuda.device_count())  # one more than there are
        with pytest.raises(InvalidInput, match=r"spec\.method is QLora.*use an image.*or method Lora") as raised:
            choose_method(make_settings(method=Method.QLORA), device)
        assert raised.value.reason == "QLoraUnsupported"


def make_settings(**changes: Any) -> TrainingSettings:
    fields = {
        "base": "/base",
        "base_uri": "s3://models/base",
        "model_id": "ft:base:abcdef",
        "language": "en",
        "train": (),
        "validation": (),
        "method": Method.LORA,
        "lora": Lora(),
        "hyperparameters": Hyperparameters(),
        "padding": Padding.BUCKETS,
        "early_stopping": None,
        "checkpoint": Checkpointing(),
        "distributed": Distributed(),
        "fingerprint": "f" * 64,
        "checkpoints": "/checkpoints",
        "resume": None,
        "output": "/output",
        "stop_file": "/stop",
    }
    return TrainingSettings.model_validate(fields | changes)


class TestMemory:
    def batch(self, utterances: int, bucket: float) -> TrainingBatch:
        none = torch.zeros(utterances, 1, dtype=torch.long)
        return TrainingBatch(torch.zeros(utterances, 80, 10), TokenBatch(none, none), none[:, 0], bucket)

    @pytest.mark.parametrize(
        ("utterances", "bucket", "changes", "says"),
        [
            pytest.param(
                16, 3.0, {}, r"16 utterances.*3 s.*maxBatchSeconds to 24 and gradientAccumulation to 2", id="buckets"
            ),
            pytest.param(
                16,
                3.0,
                {"hyperparameters": Hyperparameters(gradient_accumulation=3)},
                r"maxBatchSeconds to 24 and gradientAccumulation to 6",
                id="what accumulates goes on to",
            ),
            pytest.param(16, 30.0, {"padding": Padding.WINDOW}, r"batchSize to 8 and", id="a window's number counts"),
            pytest.param(1, 30.0, {}, r"1 utterances.*GPU with more memory.*QLora", id="one that is alone"),
        ],
    )
    def test_a_batch_that_does_not_fit_is_named_with_a_size_of_half(
        self, utterances: int, bucket: float, changes: dict[str, Any], says: str
    ) -> None:
        failure = explain_exhausted(self.batch(utterances, bucket), make_settings(**changes))
        assert isinstance(failure, OutOfMemory)
        assert re.search(says, failure.message), failure.message


class TestLoader:
    def make(self, whisper: Whisper, tmp_path: Path, count: int) -> tuple[list[TrainingUtterance], BatchLoader]:
        utterances = []
        for index in range(count):
            file = tmp_path / f"{index}.wav"
            soundfile.write(file, np.full(8000 + 160 * index, 0.1, np.float32), 16000, subtype="PCM_16")
            utterances.append(TrainingUtterance(audio=file, text="a" * (index + 1), seconds=0.5 + 0.01 * index))
        batches = [Batch((index,), 1.5) for index in range(count)]
        return utterances, BatchLoader(whisper, TranscriptEncoder(whisper, "en"), utterances, batches)

    def test_batches_come_in_the_order_planned(self, whisper: Whisper, tmp_path: Path) -> None:
        _, loader = self.make(whisper, tmp_path, 9)
        assert [batch.tokens.targets.shape[1] for batch in loader] == [index + 3 for index in range(9)]
        loader.close()

    def test_audio_that_cannot_be_decoded_ends_the_run_with_a_reason(self, whisper: Whisper, tmp_path: Path) -> None:
        utterances, loader = self.make(whisper, tmp_path, 9)
        loader.close()
        utterances[0].audio.write_bytes(b"no audio")
        again = BatchLoader(whisper, TranscriptEncoder(whisper, "en"), utterances, [Batch((0,), 1.5)])
        with pytest.raises(InvalidInput) as raised:
            list(again)
        assert raised.value.reason == "AudioDamaged"

    def load(
        self, whisper: Whisper, tmp_path: Path, batches: Sequence[Batch], augmentation: dict[str, Any] | None
    ) -> list[TrainingBatch]:
        utterances, loader = self.make(whisper, tmp_path, 9)
        loader.close()
        augmenter = augmentation and Augmenter(
            Augmentation.model_validate(augmentation),
            [one.seconds for one in utterances],
            lambda position: read_samples(utterances[position]),
            seed=7,
            epoch=2,
            window_seconds=whisper.window_seconds,
        )
        encoder = TranscriptEncoder(whisper, "en")
        loaded = BatchLoader(whisper, encoder, utterances, batches, augmenter or None)
        try:
            return list(loaded)
        finally:
            loaded.close()

    def test_what_an_epoch_does_to_audio_is_the_same_wherever_the_loader_begins(
        self, whisper: Whisper, tmp_path: Path
    ) -> None:
        wanted = {"speed": {}, "noise": {"probability": "1"}, "codec": {}, "specAugment": {}}
        batches = [Batch((0, 1, 2), 1.5), Batch((3, 4), 2.0), Batch((5, 6, 7, 8), 1.5)]
        whole = self.load(whisper, tmp_path, batches, wanted)
        rest = self.load(whisper, tmp_path, batches[1:], wanted)
        for one, other in zip(whole[1:], rest, strict=True):
            assert torch.equal(one.features, other.features)
        plain = self.load(whisper, tmp_path, batches, None)
        for one, other in zip(whole, plain, strict=True):
            assert one.features.shape == other.features.shape
            assert not torch.allclose(one.features, other.features, atol=0.1)
            assert torch.equal(one.tokens.targets, other.tokens.targets)

    def test_without_augmentation_features_are_those_of_what_was_recorded(
        self, whisper: Whisper, tmp_path: Path
    ) -> None:
        (batch,) = self.load(whisper, tmp_path, [Batch((2, 5), 1.5)], None)
        utterances, loader = self.make(whisper, tmp_path, 9)
        loader.close()
        recorded = [read_samples(utterances[position]) for position in (2, 5)]
        assert torch.equal(batch.features, whisper.features(recorded, 1.5))
        assert batch.bucket == 1.5

    def test_masks_are_seen_by_the_model_and_never_on_padding_alone(self, whisper: Whisper, tmp_path: Path) -> None:
        batches = [Batch(tuple(range(9)), 1.5)]
        masked, plain = (
            self.load(whisper, tmp_path, batches, wanted)[0].features for wanted in ({"specAugment": {}}, None)
        )
        for position in range(9):
            changed = (masked[position] != plain[position]).any(dim=0).nonzero()
            assert len(changed)
            assert int(changed.max()) < 50 + position

    def test_a_loader_that_is_closed_early_leaves_no_thread(self, whisper: Whisper, tmp_path: Path) -> None:
        _, loader = self.make(whisper, tmp_path, 9)
        next(iter(loader))
        loader.close()
        assert not loader._thread.is_alive()


class TestSelection:
    @pytest.mark.parametrize(
        ("wers", "best", "ends_after"),
        [
            pytest.param([0.5, 0.4, 0.3, 0.2], 3, None, id="falls that matter go on"),
            pytest.param([0.5, 0.3, 0.35, 0.31, 0.1], 1, 4, id="two epochs without a fall end it and the best is kept"),
            pytest.param(
                [0.3, 0.2, 0.195, 0.195, 0.1], 3, 4, id="falls too small to matter end it, and the last of them is kept"
            ),
            pytest.param(
                [0.3, 0.295, 0.289, 0.285, 0.278], 4, None, id="small falls that add up to one that matters go on"
            ),
            pytest.param([0.3, 0.3], 1, None, id="of equals the later is kept"),
        ],
    )
    def test_early_stopping(self, wers: list[float], best: int, ends_after: int | None) -> None:
        state = TrainingState(fingerprint="f" * 64, baseline_wer=0.5)
        ended = None
        for number, wer in enumerate(wers, start=1):
            state = judge_epoch(state, wer, EarlyStopping(patience=2, min_delta="0.01"))
            if state.stopped_early:
                ended = number
                break
        assert ended == ends_after
        assert state.best_epoch == best
        assert state.best_wer == wers[best]

    def test_without_early_stopping_every_epoch_is_trained(self) -> None:
        state = TrainingState(fingerprint="f" * 64, baseline_wer=0.5)
        for _ in range(50):
            state = judge_epoch(state, 0.4, None)
        assert not state.stopped_early
        assert state.epoch == 50


class TestCheckpoints:
    state = TrainingState(fingerprint="f" * 64, step=4, baseline_wer=0.5)

    def write(self, folder: Path, step: int = 4) -> Path:
        target = folder / checkpoints.folder_name(step, 0)
        (target / "engine" / "state").mkdir(parents=True)
        (target / "engine" / "state" / "weights.pt").write_bytes(bytes(range(256)) * step)
        text = self.state.model_copy(update={"step": step}).model_dump_json()
        (target / checkpoints.STATE_FILE).write_text(text)
        checkpoints.seal(target)
        return target

    def test_what_was_sealed_is_read_back(self, tmp_path: Path) -> None:
        assert checkpoints.read_sealed(self.write(tmp_path), "f" * 64) == self.state

    def test_a_damaged_file_makes_it_useless(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path)
        file = folder / "engine" / "state" / "weights.pt"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        assert checkpoints.read_sealed(folder, "f" * 64) is None

    def test_a_missing_or_additional_file_makes_it_useless(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path)
        (folder / "more").write_text("x")
        assert checkpoints.read_sealed(folder, "f" * 64) is None
        (folder / "more").unlink()
        (folder / "engine" / "state" / "weights.pt").unlink()
        assert checkpoints.read_sealed(folder, "f" * 64) is None

    def test_one_without_a_seal_counts_as_unfinished(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path)
        (folder / checkpoints.SEAL_FILE).unlink()
        assert checkpoints.read_sealed(folder, "f" * 64) is None

    def test_one_of_another_run_is_not_used(self, tmp_path: Path) -> None:
        assert checkpoints.read_sealed(self.write(tmp_path), "0" * 64) is None

    def test_the_store_keeps_the_newest_and_gives_back_the_newest_unharmed(
        self, s3_store: Store, key_prefix: str, tmp_path: Path
    ) -> None:
        for step in (2, 4, 10, 12):
            checkpoints.upload(s3_store, self.write(tmp_path / "out", step), key_prefix, keep=2)
        kept = {key.split("/")[1] for key in s3_store.list(f"{key_prefix}/")}
        assert kept == {"step-00000010-0000", "step-00000012-0000"}
        s3_store.write_bytes(f"{key_prefix}/step-00000012-0000/engine/state/weights.pt", b"cut off")
        found = checkpoints.download_newest(s3_store, key_prefix, tmp_path / "in", "f" * 64)
        assert found is not None
        state = checkpoints.read_sealed(found, "f" * 64)
        assert state is not None
        assert state.step == 10
        assert checkpoints.download_newest(s3_store, key_prefix, tmp_path / "in", "0" * 64) is None
        checkpoints.delete_all(s3_store, f"{key_prefix}/")
        assert s3_store.list(f"{key_prefix}/") == []

    def test_later_checkpoints_of_no_use_do_not_push_out_the_one_just_saved(
        self, s3_store: Store, key_prefix: str, tmp_path: Path
    ) -> None:
        for step in (100, 200):  # of another run, say
            checkpoints.upload(s3_store, self.write(tmp_path / "other", step), key_prefix, keep=2)
        for step in (2, 4):
            checkpoints.upload(s3_store, self.write(tmp_path / "out", step), key_prefix, keep=2)
        kept = sorted({key.split("/")[1] for key in s3_store.list(f"{key_prefix}/")})
        assert kept == [checkpoints.folder_name(step, 0) for step in (4, 100, 200)]

    def test_a_store_that_is_away_is_no_reason_to_begin_anew(
        self, s3_store: Store, key_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoints.upload(s3_store, self.write(tmp_path / "out", 2), key_prefix, keep=2)

        def fail(*_: object) -> None:
            raise StoreUnavailable("StoreUnavailable", "the store did not answer")

        monkeypatch.setattr(s3_store, "download_file", fail)
        with pytest.raises(StoreUnavailable):
            checkpoints.download_newest(s3_store, key_prefix, tmp_path / "in", "f" * 64)

    def test_an_upload_that_was_cut_off_is_not_seen(self, s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
        checkpoints.upload(s3_store, self.write(tmp_path / "out", 2), key_prefix, keep=2)
        s3_store.write_bytes(f"{key_prefix}/step-00000004-0000/engine/state/weights.pt", b"half")
        found = checkpoints.download_newest(s3_store, key_prefix, tmp_path / "in", "f" * 64)
        assert found is not None
        assert found.name == "step-00000002-0000"
        shutil.rmtree(found)


class TestProcesses:
    @pytest.mark.parametrize(("pod", "processes", "each"), [("8", 1, "8"), ("8", 4, "2"), ("1", 4, "1")])
    def test_processes_share_the_threads_that_the_pod_may_have(
        self, monkeypatch: pytest.MonkeyPatch, pod: str, processes: int, each: str
    ) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", pod)
        assert _environment(processes)["OMP_NUM_THREADS"] == each

    def test_events_arrive_whole_and_in_order(self, tmp_path: Path) -> None:
        with EventReader(tmp_path / "pipe") as reader:
            writer = EventWriter(tmp_path / "pipe")
            for number in range(200):
                writer.send("progress", step=number, text="x" * 50)
            received: list[int] = []
            while events := list(reader.poll(0.1)):
                received += [event["step"] for event in events]
        assert received == list(range(200))

    @pytest.mark.parametrize("character", ["x", "\u0939", "\x00", "\U0001f600"])
    def test_a_failure_arrives_however_long_and_in_whatever_script_it_is(self, tmp_path: Path, character: str) -> None:
        failure = RecipeFailure(ExitCode.INVALID_INPUT, "R" * 64, f"a{character * 5000}")
        with EventReader(tmp_path / "pipe") as reader:
            EventWriter(tmp_path / "pipe").send_failure(failure)
            (event,) = reader.poll(1)
        assert (event["kind"], event["code"], event["reason"]) == ("failed", ExitCode.INVALID_INPUT, failure.reason)
        assert failure.message.startswith(event["message"])
        assert len(event["message"]) > 250

    @pytest.mark.parametrize(("room", "left"), [(7, "a\xe9"), (6, "a"), (0, "")])
    def test_a_message_is_cut_between_characters(self, room: int, left: str) -> None:
        assert _cut("a\xe9", room) == left

    def test_a_writer_without_a_reader_fails(self, tmp_path: Path) -> None:
        reader = EventReader(tmp_path / "pipe")
        writer = EventWriter(tmp_path / "pipe")
        reader.close()
        with pytest.raises(BrokenPipeError):
            writer.send("progress")

    @pytest.mark.parametrize("code", [-9, 247, 137])
    def test_a_process_that_the_kernel_killed_ran_out_of_memory(self, code: int) -> None:
        with pytest.raises(OutOfMemory, match=r"maxBatchSeconds.*batchSize.*memory"):
            _check_exit_status(code)

    def test_a_child_that_the_kernel_killed_is_told_from_one_that_was_asked_to_end(self) -> None:
        # A parent of their own, which asks for nobody's status: this process has other children.
        command = ["sh", "-c", "sleep 600 & sleep 600 & exec sleep 600"]
        with subprocess.Popen(command) as parent:
            wait_until(lambda: len(psutil.Process(parent.pid).children()) == 2)
            asked, killed = psutil.Process(parent.pid).children()
            try:
                asked.terminate()
                wait_until(lambda: asked.status() == psutil.STATUS_ZOMBIE)
                assert not has_killed_child(parent.pid)
                killed.kill()
                wait_until(lambda: killed.status() == psutil.STATUS_ZOMBIE)
                assert has_killed_child(parent.pid)
            finally:
                for process in (asked, killed, parent):
                    process.kill()
        assert not has_killed_child(parent.pid)

    def test_another_status_is_no_success(self) -> None:
        _check_exit_status(0)
        with pytest.raises(RecipeFailure, match="status 3"):
            _check_exit_status(3)


class TestPrecision:
    def test_auto_follows_the_processor_and_the_others_are_as_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for able in ({"avx512_bf16": True}, {"amx_bf16": True}):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
            assert choose_dtype(Precision.AUTO, HOST) is torch.bfloat16
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
        assert choose_dtype(Precision.AUTO, HOST) is torch.float32
        assert choose_dtype(Precision.BF16, HOST) is torch.bfloat16
        assert choose_dtype(Precision.FP16, HOST) is torch.float16
        assert choose_dtype(Precision.FP32, HOST) is torch.float32


def finetune_recipe(**changes: Any) -> dict[str, Any]:
    recipe = {
        "recipe": "finetune",
        "base": {"uri": "s3://models/base"},
        "datasets": [dataset_input("a")],
        "modelId": "ft:base:abcdef",
        "outputPrefix": "out",
        "checkpointPrefix": "checkpoints",
    }
    return recipe | changes


def dataset_input(digit: str, **changes: Any) -> dict[str, Any]:
    return {"name": "calls", "revision": f"sha256:{digit * 64}", "uri": "s3://attune/datasets/1"} | changes


class TestRecipe:
    @pytest.mark.skipif(count_gpus() > 0, reason="there is a GPU")
    def test_fp16_without_a_gpu_is_refused_before_anything_is_fetched(
        self, make_context: Callable[..., RecipeContext]
    ) -> None:
        context = make_context(finetune_recipe(hyperparameters={"precision": "Fp16"}))
        assert isinstance(context.spec.recipe, FinetuneRecipe)
        with pytest.raises(InvalidInput, match=r"Fp16, which needs a GPU.*choose Auto") as raised:
            finetune.run(context.spec.recipe, context)
        assert raised.value.reason == "PrecisionUnsupported"

    def test_babble_needs_talkers(self, make_context: Callable[..., RecipeContext]) -> None:
        context = make_context(finetune_recipe(augmentation={"noise": {"kinds": ["White", "Babble"]}}))
        assert isinstance(context.spec.recipe, FinetuneRecipe)
        with pytest.raises(InvalidInput, match=r"noise\.kinds has Babble.*the train split has 3") as raised:
            finetune._fetch_recordings(context.spec.recipe, context, 3)
        assert raised.value.reason == "TooFewTalkers"
        assert finetune._fetch_recordings(context.spec.recipe, context, 4) == ((), ())


class TestFingerprint:
    def of(self, recordings: Sequence[Path] = (), base: str = "b", **changes: Any) -> str:
        recipe = FinetuneRecipe.model_validate(finetune_recipe(**changes))
        return finetune.mark_run(recipe, f"sha256:{base * 64}", recordings)

    @pytest.mark.parametrize(
        ("mark", "base", "changes"),
        [
            (
                "4a8f55985529a21136efd6042c6160dcd016b989f429e72dd23afaf36a7e26f0",
                "b",
                {"earlyStopping": {"patience": 2}},
            ),
            (
                "788d7f6416fd6bcc72e5a6d1163b23113d9ed7dd6b5543f9e4a93ca80fb772a9",
                "1",
                {"datasets": [dataset_input("0")]},
            ),
        ],
    )
    def test_a_checkpoint_of_an_earlier_release_is_gone_on_from(
        self, mark: str, base: str, changes: dict[str, Any]
    ) -> None:
        """Options that came later have no part in a run that does not set them; these marks are from before."""
        assert self.of(base=base, **changes) == mark

    def test_one_of_another_course_is_not(self) -> None:
        speed = {"augmentation": {"speed": {}}}
        old = {"dataset": dataset_input("c")}
        marks = [
            self.of(),
            self.of(base="c"),
            self.of(datasets=[dataset_input("0")]),
            self.of(datasets=[dataset_input("a", weight="2")]),
            self.of(datasetTemperature="2"),
            self.of(budget={"maxHours": "1", "costPerGpuHour": "2"}),
            self.of(method="Full"),
            self.of(method="QLora"),
            self.of(lora={"variant": "Dora"}),
            self.of(lora={"targetModules": ["fc1"]}),
            self.of(hyperparameters={"gradientAccumulation": 2}),
            self.of(hyperparameters={"dropout": "0"}),
            self.of(hyperparameters={"dropout": "0.1"}),
            self.of(distributed={"deepspeed": {"zeroStage": 3}}),
            self.of(retention=old | {"replay": {}}),
            self.of(retention=old | {"replay": {"ratio": "0.5"}}),
            self.of(retention=old | {"ewc": {"lambda": "1"}}),
            self.of(**speed),
            self.of(augmentation={"speed": {"min": "0.8"}}),
            self.of([Path("fan.flac")], **speed),
            self.of([Path("street.flac")], **speed),
        ]
        assert len(set(marks)) == len(marks)
        assert self.of(budget={"costPerGpuHour": "2"}) == marks[0]  # a price ends no run
