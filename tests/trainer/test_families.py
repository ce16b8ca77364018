"""What every family of models has to do alike, each with a tiny model of its own."""

import json
import shutil
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from attune.contract.training import (
    Augmentation,
    Checkpointing,
    Distributed,
    Hyperparameters,
    Lora,
    Method,
    Padding,
)
from attune_trainer.failures import InvalidInput, UnsupportedModel
from attune_trainer.modeling import Recognizer, families, load_recognizer
from attune_trainer.modeling.artifact import Artifact, read_artifact, write_artifact
from attune_trainer.modeling.buckets import BUCKETS
from attune_trainer.modeling.families import load_model
from attune_trainer.modeling.speech_model import IGNORED, SpeechModel
from attune_trainer.store import digest_directory
from attune_trainer.training.adapters import Adapters, linear_layers
from attune_trainer.training.batches import plan_epoch
from attune_trainer.training.consolidation import Importance
from attune_trainer.training.epochs import check_augmentation
from attune_trainer.training.export import clean_generation, describe_artifact
from attune_trainer.training.full import AllWeights
from attune_trainer.training.launch import TrainingProcesses
from attune_trainer.training.loader import BatchLoader, read_samples
from attune_trainer.training.methods import TrainingMethod
from attune_trainer.training.objective import TranscriptionLoss
from attune_trainer.training.settings import MODEL_FOLDER, TrainingSettings, TrainingUtterance
from attune_trainer.training.transcripts import TranscriptEncoder, select_usable
from attune_trainer.training.weights import trained_parameters
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModelForCTC, MoonshineForConditionalGeneration

from tests.trainer.tiny_families import BUILDERS, build_wav2vec2, speak

TEXTS = ("yes", "no", "stop", "go on", "call me", "good bye", "hello", "left", "right", "all off")
FAMILIES = sorted(BUILDERS)
LEARNING_RATE, MOST_EPOCHS = 3e-3, 240
CTC = ("wav2vec2", "hubert", "wavlm", "parakeet_ctc")
Build = Callable[[str], Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a network is slower with several, and very slow where others use the processors, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Gives the folder of a tiny model of a family."""
    built: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in built:
            built[family] = BUILDERS[family](tmp_path_factory.mktemp(family))
        return built[family]

    return make


@pytest.fixture
def copy(build: Build, tmp_path: Path) -> Build:
    """Gives a folder of which files may be changed."""
    return lambda family: Path(shutil.copytree(build(family), tmp_path / family))


def hear(model: SpeechModel, texts: tuple[str, ...], bucket: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gives what the loss takes."""
    encoder = TranscriptEncoder(model, "en")
    tokens = encoder.batch([encoder.encode(text) or [] for text in texts])
    clips = [speak(text, seed) for seed, text in enumerate(texts)]
    return model.features(clips, bucket), tokens.inputs, tokens.targets, model.lengths(clips, bucket)


def edit_extractor(folder: Path, **changes: object) -> None:
    """Changes the feature extractor's file: where there is a processor, a part of its file."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        edit_json(file, **changes)
        return
    file = folder / "processor_config.json"
    edit_json(file, feature_extractor=json.loads(file.read_text())["feature_extractor"] | changes)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingUtterance, ...]:
    """Ten utterances, on the disk."""
    folder = tmp_path_factory.mktemp("spoken")
    utterances = []
    for index, text in enumerate(TEXTS):
        file, samples = folder / f"{index}.wav", speak(text, index)
        soundfile.write(file, samples, 16000, subtype="PCM_16")
        utterances.append(TrainingUtterance(audio=file, text=text, seconds=len(samples) / 16000))
    return tuple(utterances)


def transcribe(recognizer: Recognizer, spoken: Sequence[TrainingUtterance]) -> list[str]:
    """Gives what is heard in small letters: a vocabulary may have none."""
    return [text.lower() for text in recognizer.transcribe([read_samples(one) for one in spoken])]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ten_utterances_are_learned_by_heart_saved_and_served_as_they_were_heard(
    build: Build, spoken: tuple[TrainingUtterance, ...], tmp_path: Path, family: str
) -> None:
    base = build(family)
    model, method = load_model(base), AllWeights()
    encoder = TranscriptEncoder(model, "en")
    utterances = select_usable(spoken, encoder, model)
    assert len(utterances) == len(TEXTS)
    network = method.attach(model)
    clean_generation(model)
    artifact = describe_artifact(
        model, Padding.BUCKETS, base_uri="s3://a/b", model_id="ft:tiny:abcdef", language=encoder.language
    )
    recognizer = Recognizer(model, artifact)
    assert transcribe(recognizer, spoken) != list(TEXTS)
    objective = TranscriptionLoss(network, model)
    optimizer = torch.optim.AdamW(trained_parameters(network).values(), lr=0.0)
    torch.manual_seed(1)
    for epoch in range(MOST_EPOCHS):
        plan = plan_epoch(
            [one.seconds for one in utterances],
            recognizer.buckets,
            batch_size=10,
            max_batch_seconds=48,
            seed=7,
            epoch=epoch,
        )
        loader = BatchLoader(model, encoder, utterances, [batch for step in plan for batch in step])
        network.train()
        for batch in loader:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (epoch + 1) / 20)
            optimizer.zero_grad(set_to_none=True)
            objective(*batch.tensors).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        loader.close()
        network.eval()
        if epoch % 20 == 19 and transcribe(recognizer, spoken) == list(TEXTS):
            break
    assert transcribe(recognizer, spoken) == list(TEXTS)
    method.export(network, model, tmp_path, base=base, artifact=artifact)
    merged = tmp_path / MODEL_FOLDER
    assert {file.suffix for file in merged.iterdir()} <= {".json", ".safetensors", ".jinja"}
    served = load_recognizer(merged, "cpu")
    assert served.model_id == "ft:tiny:abcdef"
    assert transcribe(served, spoken) == list(TEXTS)
    assert [transcribe(served, [one])[0] for one in spoken] == list(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["moonshine", "wav2vec2", "qwen3_asr"])
def test_training_processes_take_every_family_from_the_baseline_to_a_merged_model(
    build: Build, spoken: tuple[TrainingUtterance, ...], tmp_path: Path, family: str
) -> None:
    events: list[dict[str, Any]] = []
    with TrainingProcesses(tmp_path / "processes", 1) as processes:
        processes.begin(
            TrainingSettings(
                base=build(family),
                base_uri="s3://attune/base",
                model_id=f"ft:{family}:abcdef",
                language="en",
                train=spoken,
                validation=spoken[:4],
                method=Method.LORA,
                lora=Lora(rank=4),
                hyperparameters=Hyperparameters(epochs=1, batch_size=5),
                padding=Padding.BUCKETS,
                early_stopping=None,
                checkpoint=Checkpointing(),
                distributed=Distributed(),
                fingerprint="f" * 64,
                checkpoints=tmp_path / "checkpoints",
                resume=None,
                output=tmp_path / "output",
                stop_file=processes.stop_file,
            )
        )
        processes.follow(events.append, lambda: False)
    (finished,) = (event for event in events if event["kind"] == "finished")
    assert finished["steps"] == finished["total_steps"] > 0
    recognizer = load_recognizer(tmp_path / "output" / MODEL_FOLDER, "cpu")
    assert recognizer.model_id == f"ft:{family}:abcdef"
    assert len(transcribe(recognizer, spoken)) == len(TEXTS)


class TestHearing:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_batch_says_what_its_clips_say_alone_whatever_they_are_padded_to(self, copy: Build, family: str) -> None:
        folder = copy(family)
        write_artifact(folder, Artifact(padding=Padding.BUCKETS, buckets=BUCKETS))
        recognizer = load_recognizer(folder, "cpu")
        clips = [speak(text, seed) for seed, text in enumerate((*TEXTS[:4], "a"))]
        together = recognizer.transcribe(clips)
        assert together == [recognizer.transcribe([clip])[0] for clip in clips]
        assert len(set(together)) > 1

    @pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"whisper"}))
    def test_padding_changes_nothing_of_what_the_network_says(self, build: Build, family: str) -> None:
        model = load_model(build(family))
        assert not model.hears_padding
        texts = ("yes", "good bye")
        with torch.inference_mode():
            features, inputs, _, lengths = hear(model, texts, 4.0)
            together = model.logits(features, inputs, lengths)
            loss = model.loss(*hear(model, texts[:1], 4.0))
            features, inputs, _, lengths = hear(model, texts[:1], 1.5)
            alone = model.logits(features, inputs, lengths)
            torch.testing.assert_close(model.loss(*hear(model, texts[:1], 1.5)), loss, atol=1e-4, rtol=1e-4)
        heard = inputs.shape[1] or int(model.frames(lengths))
        torch.testing.assert_close(together[:1, :heard], alone[:, :heard], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("family", CTC)
    def test_a_ctc_model_says_what_it_says_in_transformers(self, build: Build, family: str) -> None:
        folder = build(family)
        model, clip = load_model(folder), speak("hello")
        original = AutoModelForCTC.from_pretrained(folder).eval()
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        with torch.inference_mode():
            expected = original(**extractor(clip, sampling_rate=16000, return_tensors="pt")).logits
            features, lengths = model.features([clip], 4.0), model.lengths([clip], 4.0)
            found = model.logits(features, torch.empty(1, 0), lengths)
        frames = int(model.frames(lengths))
        torch.testing.assert_close(found[:, :frames], expected[:, :frames], atol=1e-4, rtol=1e-4)
        assert expected.shape[1] - frames in {0, 1}  # Parakeet's extractor adds a frame that it masks

    def test_a_moonshine_says_what_it_says_in_transformers(self, build: Build) -> None:
        folder = build("moonshine")
        model, clip = load_model(folder), speak("hello")
        original = MoonshineForConditionalGeneration.from_pretrained(folder).eval()
        generated = original.generate(torch.from_numpy(clip)[None], max_new_tokens=40, do_sample=False)
        expected = model.tokenizer.decode(generated[0], skip_special_tokens=True).strip()
        assert expected
        features, lengths = model.features([clip], 4.0), model.lengths([clip], 4.0)
        assert model.decode(features, lengths)[0][: len(expected)] == expected

    @pytest.mark.parametrize("family", FAMILIES)
    def test_it_always_ends(self, build: Build, family: str) -> None:
        model = load_model(build(family))
        clips = [speak("a"), np.zeros(8000, np.float32), np.full(1, 0.5, np.float32)]
        texts = model.decode(model.features(clips, 1.5), model.lengths(clips, 1.5))
        assert len(texts) == 3
        assert all(len(text) <= 16 + 25 for text in texts)

    @pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"whisper"}))
    def test_a_pretrained_model_that_does_not_hear_padding_gets_little_of_it(self, build: Build, family: str) -> None:
        assert read_artifact(build(family)).padding is Padding.WINDOW
        recognizer = load_recognizer(build(family), "cpu")
        recognizer.warm_up()
        assert recognizer.padded_seconds(1.0) == 1.5
        assert recognizer.window_seconds == (10 if family == "qwen2_audio" else 30)


class TestTraining:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("method", [Adapters(Lora(rank=4)), AllWeights()], ids=["Lora", "Full"])
    def test_what_is_written_computes_what_was_trained(
        self, build: Build, tmp_path: Path, family: str, method: TrainingMethod
    ) -> None:
        base = build(family)
        model = load_model(base)
        network = method.attach(model)
        clean_generation(model)
        network.train()
        buffers = {name: value.clone() for name, value in model.model.named_buffers()}
        tensors = hear(model, TEXTS[:3], 2.5)
        model.loss(*tensors).backward()
        trained = trained_parameters(network)
        moved = [name for name, weight in trained.items() if weight.grad is not None and weight.grad.abs().max() > 0]
        # The first step of adapters moves only their second half; of the weights, all but keys' biases count.
        assert len(moved) >= len(trained) * (0.5 if isinstance(method, Adapters) else 0.9), set(trained) - set(moved)
        assert all(torch.equal(value, buffers[name]) for name, value in model.model.named_buffers())
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in trained.values():
                weight.add_(torch.randn(weight.shape, generator=draw), alpha=0.02)
        network.eval()
        features, inputs, _, lengths = tensors
        with torch.inference_mode():
            before = model.logits(features, inputs, lengths)
        artifact = describe_artifact(model, Padding.BUCKETS, base_uri="s3://a/b", model_id="m", language=None)
        method.export(network, model, tmp_path, base=base, artifact=artifact)
        again = load_model(tmp_path / MODEL_FOLDER)
        with torch.inference_mode():
            torch.testing.assert_close(again.logits(features, inputs, lengths), before, atol=1e-3, rtol=1e-3)
        assert torch.equal(again.features([speak("yes")], 1.5), model.features([speak("yes")], 1.5))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_layer_that_may_be_adapted_has_a_say_in_the_loss(self, build: Build, family: str) -> None:
        model = load_model(build(family))
        network = Adapters(Lora(rank=4)).attach(model)
        model.loss(*hear(model, TEXTS[:3], 2.5)).backward()
        gradients = {name: weight.grad for name, weight in trained_parameters(network).items() if "lora_B" in name}
        assert len(gradients) == len(list(linear_layers(load_model(build(family)))))
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_a_family_needs_of_its_weights_can_be_held(self, build: Build, family: str) -> None:
        model = load_model(build(family))
        network = Adapters(Lora(rank=4)).attach(model).eval()
        importance = Importance(network, model)
        importance.add(TranscriptionLoss(network, model), *hear(model, TEXTS[:3], 2.5))
        consolidation = importance.consolidate(1.0)
        assert float(consolidation.penalty().detach()) == 0
        with torch.no_grad():
            for name, weight in trained_parameters(network).items():
                if "lora_B" in name:
                    weight.fill_(0.05)
        assert float(consolidation.penalty().detach()) > 0

    @pytest.mark.parametrize("family", FAMILIES)
    def test_dropout_acts_in_training_alone(self, build: Build, family: str) -> None:
        model = load_model(build(family))
        features, inputs, _, lengths = hear(model, TEXTS[:2], 2.0)

        def say() -> Tensor:
            with torch.inference_mode():
                return model.logits(features, inputs, lengths)

        before = say()
        model.model.train()
        torch.testing.assert_close(say(), before)  # no base here has dropout, and no layer is left out
        model.set_dropout(0.3)
        assert not torch.equal(say(), say())
        model.model.eval()
        torch.testing.assert_close(say(), before)

    @pytest.mark.parametrize("family", CTC)
    def test_a_ctc_loss_is_transformers_own_divided_by_the_tokens(self, build: Build, family: str) -> None:
        folder = build(family)
        model = load_model(folder)
        features, inputs, targets, lengths = hear(model, ("hello",), 4.0)
        original = AutoModelForCTC.from_pretrained(folder, ctc_loss_reduction="sum").eval()
        extracted = AutoFeatureExtractor.from_pretrained(folder)(
            speak("hello"), sampling_rate=16000, return_tensors="pt"
        )
        with torch.inference_mode():
            expected = original(**extracted, labels=targets).loss / (targets != IGNORED).sum()
            torch.testing.assert_close(model.loss(features, inputs, targets, lengths), expected, atol=1e-4, rtol=1e-4)


class TestTranscripts:
    @pytest.mark.parametrize("letters", [string.ascii_uppercase, string.ascii_lowercase])
    def test_case_is_the_vocabularys_affair_where_it_has_only_one(self, tmp_path: Path, letters: str) -> None:
        model = load_model(build_wav2vec2(tmp_path, letters))
        assert model.tokenise("Go on") == model.tokenise("GO ON") == model.tokenise("go on")
        encoder = TranscriptEncoder(model, "en")
        assert encoder.lost("Go on") == set()
        assert encoder.lost("go on, 5") == set(",5")

    def test_a_vocabulary_of_both_cases_keeps_them(self, tmp_path: Path) -> None:
        model = load_model(build_wav2vec2(tmp_path, string.ascii_letters))
        assert model.tokenise("Go") != model.tokenise("go")

    @pytest.mark.parametrize("family", CTC)
    def test_words_and_twice_the_same_letter_come_back(self, build: Build, family: str) -> None:
        model = load_model(build(family))
        ids = TranscriptEncoder(model, "en").encode("all off")
        assert ids is not None
        assert model.tokenizer.decode(ids, skip_special_tokens=True, group_tokens=False).lower() == "all off"

    @pytest.mark.parametrize("family", CTC)
    def test_more_tokens_than_frames_are_too_long(self, build: Build, family: str) -> None:
        model = load_model(build(family))
        frames = int(model.frames(torch.tensor([16000])))
        encoder = TranscriptEncoder(model, "en")

        def select(text: str) -> tuple[TrainingUtterance, ...]:
            return select_usable([TrainingUtterance(audio=Path("a.wav"), text=text, seconds=1.0)], encoder, model)

        assert len(select("ab" * (frames // 2))) == 1
        assert len(select("a" * (frames // 2))) == 1  # a blank has to stand between any two
        with pytest.raises(InvalidInput, match="more tokens than a CTC model has frames") as raised:
            select("a" * (frames // 2 + 2))
        assert raised.value.reason == "UtterancesTooLong"

    def test_a_moonshine_has_room_for_as_many_tokens_as_positions(self, build: Build) -> None:
        model = load_model(build("moonshine"))
        encoder = TranscriptEncoder(model, "en")
        assert encoder.encode("a" * 59) is not None
        assert encoder.encode("a" * 60) is None
        assert encoder.language is None


class TestRefusals:
    def test_an_unknown_architecture_is_named_beside_all_known_ones(self, copy: Build) -> None:
        folder = copy("wav2vec2")
        edit_json(folder / "config.json", architectures=["SpeechT5ForTextToSpeech"])
        with pytest.raises(UnsupportedModel) as raised:
            load_model(folder)
        assert all(name in raised.value.message for name in (*families.FAMILIES, "SpeechT5ForTextToSpeech"))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_configuration_without_architectures_is_known_by_its_type(self, copy: Build, family: str) -> None:
        folder = copy(family)
        expected = type(load_model(folder))
        edit_json(folder / "config.json", architectures=None)
        assert type(load_model(folder)) is expected

    @pytest.mark.parametrize("family", CTC)
    def test_a_ctc_model_without_a_vocabulary_says_so(self, copy: Build, family: str) -> None:
        folder = copy(family)
        for name in ("vocab.json", "tokenizer.json"):
            (folder / name).unlink(missing_ok=True)
        with pytest.raises(InvalidInput, match=r"vocab\.json nor tokenizer\.json") as raised:
            load_model(folder)
        assert raised.value.reason == "VocabularyMissing"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_another_sampling_rate_is_named(self, copy: Build, family: str) -> None:
        folder = copy(family)
        edit_extractor(folder, sampling_rate=24000)
        with pytest.raises(InvalidInput, match="24000 Hz") as raised:
            load_model(folder)
        assert raised.value.reason == "SampleRateMismatch"

    @pytest.mark.parametrize("family", ["whisper", "parakeet_ctc", "qwen2_audio", "qwen3_asr"])
    def test_mel_bins_that_do_not_fit_are_named(self, copy: Build, family: str) -> None:
        folder = copy(family)
        edit_extractor(folder, feature_size=128)
        with pytest.raises(InvalidInput, match=r"128 mel bins.*80") as raised:
            load_model(folder)
        assert raised.value.reason == "MelMismatch"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_weights_that_run_code_are_not_read(self, copy: Build, family: str) -> None:
        folder = copy(family)
        state = load_model(folder).model.state_dict()
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        with pytest.raises(InvalidInput, match="safetensors"):
            load_model(folder)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_spec_augment_is_for_models_that_hear_log_mel_features(self, build: Build, family: str) -> None:
        model = load_model(build(family))
        wanted = Augmentation.model_validate({"noise": {}, "specAugment": {}})
        check_augmentation(Augmentation.model_validate({"noise": {}}), model)
        if not model.reads_samples:
            check_augmentation(wanted, model)
            mels = model.log_mel(model.features([speak("yes")], 1.5)).shape
            assert mels[1] == 80
            assert mels[2] >= 150
            return
        assert family in {"moonshine", "wav2vec2", "hubert", "wavlm"}
        with pytest.raises(InvalidInput, match="specAugment") as raised:
            check_augmentation(wanted, model)
        assert raised.value.reason == "AugmentationUnsupported"

    def test_a_layer_that_no_adapter_reaches_is_refused(self, build: Build) -> None:
        with pytest.raises(InvalidInput, match="targetModules names q_proj") as raised:
            Adapters(Lora(rank=4, target_modules=["q_proj"])).attach(load_model(build("wavlm")))
        assert raised.value.reason == "UnknownTargetModule"

    def test_what_pre_training_alone_needs_may_be_missing_and_is_written_without_chance(
        self, copy: Build, tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file, save_file  # noqa: PLC0415

        folder = copy("wav2vec2")
        weights = load_file(folder / "model.safetensors")
        del weights["wav2vec2.masked_spec_embed"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name in ("one", "two"):
            model = load_model(folder)
            artifact = describe_artifact(model, Padding.BUCKETS, base_uri="s3://a/b", model_id="m", language=None)
            AllWeights().export(model.model, model, tmp_path / name, base=folder, artifact=artifact)
        assert digest_directory(tmp_path / "one") == digest_directory(tmp_path / "two")
