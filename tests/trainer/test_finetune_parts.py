import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
from attune.contract.exitcode import ExitCode
from attune.contract.training import EarlyStopping, Lora, Padding, Precision
from attune_trainer.failures import InvalidInput, OutOfMemory, RecipeFailure, StoreUnavailable
from attune_trainer.modeling import load_recognizer
from attune_trainer.modeling.buckets import BUCKETS
from attune_trainer.modeling.whisper import Whisper, load_whisper
from attune_trainer.store import Store
from attune_trainer.training import adapters, checkpoints
from attune_trainer.training.arithmetic import wants_bf16
from attune_trainer.training.batches import Batch, plan_epoch
from attune_trainer.training.checkpoints import TrainingState
from attune_trainer.training.events import EventReader, EventWriter, _cut
from attune_trainer.training.launch import _check_exit_status, _environment, has_killed_child
from attune_trainer.training.loader import BatchLoader
from attune_trainer.training.objective import TranscriptionLoss
from attune_trainer.training.schedule import learning_rate_factor
from attune_trainer.training.selection import judge_epoch
from attune_trainer.training.settings import TrainingUtterance
from attune_trainer.training.transcripts import IGNORED, TranscriptEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
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
            found = TranscriptionLoss(whisper.model, whisper)(features, tokens.inputs, tokens.targets)
        torch.testing.assert_close(found, expected)


class TestAdapters:
    def test_all_linear_layers_of_encoder_and_decoder_are_adapted_and_nothing_else_trains(
        self, whisper: Whisper
    ) -> None:
        model = adapters.attach_adapters(whisper, Lora(rank=4))
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all("lora_" in name for name in trainable)
        # 2 layers: 4 attention and 2 feed-forward in the encoder; twice the attention in the decoder; A and B each.
        assert len(trainable) == 2 * (2 * (4 + 2) + 2 * (8 + 2))

    def test_a_rank_beyond_the_narrowest_layer_is_refused_with_the_bound(self, whisper: Whisper) -> None:
        with pytest.raises(InvalidInput, match=r"rank is 33.*32"):
            adapters.attach_adapters(whisper, Lora(rank=33))

    @pytest.mark.parametrize("padding", list(Padding))
    def test_the_merged_model_computes_what_the_adapted_one_does(
        self, tiny: Path, whisper: Whisper, tmp_path: Path, padding: Padding
    ) -> None:
        model = adapters.attach_adapters(whisper, Lora(rank=4)).eval()
        adapters.clean_generation(whisper)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        features = whisper.features([np.ones(8000, np.float32)], 2.0)
        inputs = torch.tensor([whisper.prompt()])
        with torch.inference_mode():
            before = whisper.model(input_features=features, decoder_input_ids=inputs).logits
        artifact = adapters.describe_artifact(
            whisper, padding, base_uri="s3://models/tiny", model_id="ft:tiny:abcdef", language=None
        )
        state = adapters.adapter_state(model)
        adapter, merged = adapters.export(model, whisper, tmp_path, base=tiny, artifact=artifact)
        untuned = load_whisper(tiny)
        with torch.inference_mode():
            assert not torch.allclose(
                untuned.model(input_features=features, decoder_input_ids=inputs).logits, before, atol=1e-2
            )
            again = load_whisper(merged).model(input_features=features, decoder_input_ids=inputs).logits
            torch.testing.assert_close(again, before, atol=1e-4, rtol=1e-4)
            adapted = adapters.attach_adapters(untuned, Lora(rank=4)).eval()
            adapters.load_adapter_state(adapted, adapter / adapters.ADAPTER_WEIGHTS)
            torch.testing.assert_close(
                untuned.model(input_features=features, decoder_input_ids=inputs).logits, before, atol=1e-5, rtol=1e-5
            )
        assert set(state) == set(adapters.adapter_state(adapted))
        assert load_recognizer(merged, "cpu").padding is padding
        assert json.loads((merged / "config.json").read_text())["architectures"] == ["WhisperForConditionalGeneration"]
        # The folder is anybody's: transformers alone loads it too, and peft the adapter.
        WhisperForConditionalGeneration.from_pretrained(merged)
        assert (
            json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "s3://models/tiny"
        )

    def test_adapters_of_another_shape_are_not_taken(self, whisper: Whisper, tiny: Path, tmp_path: Path) -> None:
        file = tmp_path / "adapter.safetensors"
        adapters.save_adapter_state(adapters.adapter_state(adapters.attach_adapters(whisper, Lora(rank=4))), file)
        other = adapters.attach_adapters(load_whisper(tiny), Lora(rank=8))
        with pytest.raises(ValueError, match="differs"):
            adapters.load_adapter_state(other, file)


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
        host = torch.device("cpu")
        for able in ({"avx512_bf16": True}, {"amx_bf16": True}):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
            assert wants_bf16(Precision.AUTO, host)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
        assert not wants_bf16(Precision.AUTO, host)
        assert wants_bf16(Precision.BF16, host)
        assert not wants_bf16(Precision.FP32, host)
