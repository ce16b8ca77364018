"""Checkpoints of which each pod has a part on its own disk, and how often pods have lost each other since."""

from pathlib import Path

import pytest
from attune_trainer.failures import PeerLost
from attune_trainer.store import Store
from attune_trainer.training import checkpoints
from attune_trainer.training.checkpoints import TrainingState
from attune_trainer.training.engine import is_peer_lost

MARK = "f" * 64
ENGINE = checkpoints.ENGINE_FOLDER


def write_parts(disk: Path, step: int, mark: str = "1a2b3c4d") -> tuple[Path, Path]:
    """Writes what two pods have of a checkpoint, the first one with the seal of both."""
    name = checkpoints.folder_name(step, 0, mark)
    first, second = (disk / pod / name for pod in ("first", "second"))
    for number, folder in enumerate((first, second)):
        (folder / ENGINE).mkdir(parents=True)
        (folder / ENGINE / f"rank_{number}.pt").write_bytes(bytes([number]) * 100)
    state = TrainingState(fingerprint=MARK, step=step, baseline_wer=0.5)
    (first / checkpoints.STATE_FILE).write_text(state.model_dump_json())
    checkpoints.seal(first, [checkpoints.digest_part(second)])
    return first, second


def no_wait() -> None:
    raise AssertionError("there is nothing to wait for")


def test_the_seal_follows_the_last_part_and_any_pod_can_verify_the_whole(
    s3_store: Store, key_prefix: str, tmp_path: Path
) -> None:
    first, second = write_parts(tmp_path, 8)
    seal = f"{key_prefix}/{first.name}/{checkpoints.SEAL_FILE}"
    waited = []

    def wait() -> None:
        assert not s3_store.exists(seal)
        waited.append(1)
        if len(waited) == 3:
            checkpoints.upload(s3_store, second, key_prefix, 2, no_wait)

    checkpoints.upload(s3_store, first, key_prefix, 2, wait)
    assert len(waited) == 3
    found = checkpoints.download(s3_store, key_prefix, first.name, tmp_path / "third", MARK)
    assert found is not None
    assert {file.name for file in (found / ENGINE).iterdir()} == {"rank_0.pt", "rank_1.pt"}
    s3_store.write_bytes(f"{key_prefix}/{first.name}/{ENGINE}/rank_1.pt", b"another")
    assert checkpoints.download(s3_store, key_prefix, first.name, tmp_path / "third", MARK) is None
    assert checkpoints.download(s3_store, key_prefix, "step-00000009-0000", tmp_path / "third", MARK) is None


def test_a_part_that_never_comes_leaves_no_seal(s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
    def lost() -> None:
        raise PeerLost([1])

    first, _ = write_parts(tmp_path, 8)
    with pytest.raises(PeerLost):
        checkpoints.upload(s3_store, first, key_prefix, 2, lost)
    assert checkpoints.download_newest(s3_store, key_prefix, tmp_path / "in", MARK) is None


def test_a_part_of_an_earlier_attempt_is_no_part_of_this_one(s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
    _, earlier = write_parts(tmp_path / "earlier", 8, mark="00000000")
    checkpoints.upload(s3_store, earlier, key_prefix, 2, no_wait)
    first, second = write_parts(tmp_path / "now", 8)
    waited = []

    def wait() -> None:
        waited.append(1)
        checkpoints.upload(s3_store, second, key_prefix, 2, no_wait)

    checkpoints.upload(s3_store, first, key_prefix, 2, wait)
    assert waited


def test_what_earlier_attempts_have_left_unfinished_goes_and_what_is_in_the_making_stays(
    s3_store: Store, key_prefix: str, tmp_path: Path
) -> None:
    left, ahead = write_parts(tmp_path / "left", 4)[1], write_parts(tmp_path / "ahead", 12)[1]
    for part in (left, ahead):
        checkpoints.upload(s3_store, part, key_prefix, 1, no_wait)
    first, second = write_parts(tmp_path / "now", 8)
    checkpoints.upload(s3_store, second, key_prefix, 1, no_wait)
    checkpoints.upload(s3_store, first, key_prefix, 1, no_wait)
    assert {key.split("/")[1] for key in s3_store.list(f"{key_prefix}/")} == {first.name, ahead.name}


def test_losses_are_counted_from_the_newest_checkpoint_on(s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
    assert [checkpoints.count_loss(s3_store, key_prefix) for _ in range(3)] == [1, 2, 3]
    for folder in reversed(write_parts(tmp_path, 8)):
        checkpoints.upload(s3_store, folder, key_prefix, 2, no_wait)
    assert [checkpoints.count_loss(s3_store, key_prefix) for _ in range(2)] == [1, 2]
    assert checkpoints.download_newest(s3_store, key_prefix, tmp_path / "in", MARK) is not None


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[/w/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711", True),
        ("[/w/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_peer_that_is_gone_is_told_from_a_defect(message: str, lost: bool) -> None:  # noqa: FBT001 (a column)
    assert is_peer_lost(RuntimeError(message)) == lost
    outer = ValueError("a step failed")
    outer.__cause__ = RuntimeError(message)
    assert is_peer_lost(outer) == lost
