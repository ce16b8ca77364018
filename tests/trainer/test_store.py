"""The store against a real S3 server: objects, folders, models, and what goes wrong."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from attune.contract.exitcode import ExitCode
from attune_trainer.failures import RecipeFailure, from_exception
from attune_trainer.store import Store, StoredObject, digest_directory, fetch_model
from safetensors.numpy import save_file

from .conftest import S3Server, free_port


def fails_with(code: ExitCode, reason: str) -> "pytest.RaisesExc[RecipeFailure]":
    return pytest.raises(RecipeFailure, check=lambda failure: (failure.code, failure.reason) == (code, reason))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "nested").mkdir(parents=True)
    save_file({"weight": np.arange(4, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    (folder / "nested" / "tokenizer.json").write_text("{}")
    return folder


def test_objects_are_written_listed_read_and_removed(s3_store: Store, key_prefix: str) -> None:
    assert s3_store.list(f"{key_prefix}/") == []
    assert s3_store.write_bytes(f"{key_prefix}/b", b"second") == f"s3://attune/{key_prefix}/b"
    s3_store.write_bytes(f"s3://attune/{key_prefix}/a/1", b"first")
    assert s3_store.list(f"{key_prefix}/") == [f"{key_prefix}/a/1", f"{key_prefix}/b"]
    assert s3_store.read_bytes(s3_store.uri(f"{key_prefix}/a/1")) == b"first"
    assert s3_store.exists(f"{key_prefix}/b")
    s3_store.delete(f"{key_prefix}/b")
    s3_store.delete(f"{key_prefix}/b")
    assert not s3_store.exists(f"{key_prefix}/b")
    with fails_with(ExitCode.NOT_FOUND, "ObjectNotFound"):
        s3_store.read_bytes(f"{key_prefix}/b")


def test_a_directory_goes_up_and_comes_back(s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for index in range(30):
        path = source / f"d{index % 3}" / f"file {index} é+&%20#.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([index]) * (index * 1000))
    (source / "large.safetensors").write_bytes(bytes(6 << 20))  # more than one part
    (source / ".hidden").write_text("stays here")
    uri = s3_store.upload_directory(source, f"{key_prefix}/up/")
    assert uri == f"s3://attune/{key_prefix}/up"
    back = s3_store.download_prefix(uri, tmp_path / "back")
    assert digest_directory(back) == digest_directory(source)
    assert not (back / ".hidden").exists()
    assert not list(back.rglob("*.part"))
    with fails_with(ExitCode.NOT_FOUND, "SourceEmpty"):
        s3_store.download_prefix(f"{key_prefix}/u", tmp_path / "other")  # a folder, not any name that begins alike


def test_a_listing_goes_on_beyond_the_thousand_keys_that_one_answer_holds(
    s3_store: Store, key_prefix: str, tmp_path: Path
) -> None:
    names = [f"{number:04d}" for number in range(1005)]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    s3_store.upload_directory(tmp_path, key_prefix)
    assert s3_store.list(f"{key_prefix}/") == [f"{key_prefix}/{name}" for name in names]


def test_digest_is_of_names_and_contents_alone(model: Path) -> None:
    digest = digest_directory(model)
    lines = [
        f"{name}\0{hashlib.sha256((model / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors", "nested/tokenizer.json")
    ]
    assert digest == "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
    (model / "config.json").chmod(0o600)
    (model / "config.json").touch()
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_text("of a tool")
    assert digest_directory(model) == digest
    (model / "config.json").rename(model / "renamed.json")
    assert digest_directory(model) != digest


def test_a_model_is_fetched_and_verified(s3_store: Store, key_prefix: str, model: Path, tmp_path: Path) -> None:
    uri = s3_store.upload_directory(model, f"{key_prefix}/model")
    digest = digest_directory(model)
    s3_store.write_bytes(f"{key_prefix}/model/pytorch_model.bin", b"pickled")
    s3_store.write_bytes(f"{key_prefix}/model/modeling_evil.py", b"print('hello')")
    target = tmp_path / "fetched"
    target.mkdir()
    (target / "left.json").write_text("of an earlier attempt")
    assert digest_directory(fetch_model(s3_store, uri, target, digest)) == digest
    other = Store(s3_store.endpoint, "another", access_key="x", secret_key="y" * 8)
    assert other.for_bucket("attune").bucket == "attune"
    s3_store.write_bytes(f"{key_prefix}/model/config.json", b"{}")
    with fails_with(ExitCode.INVALID_INPUT, "DigestMismatch"):
        fetch_model(s3_store, uri, target, digest)


def test_weights_that_could_run_code_are_refused(s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
    s3_store.write_bytes(f"{key_prefix}/model/pytorch_model.bin", b"pickled")
    s3_store.write_bytes(f"{key_prefix}/model/config.json", b"{}")
    with fails_with(ExitCode.INVALID_INPUT, "NotSafetensors"):
        fetch_model(s3_store, s3_store.uri(f"{key_prefix}/model"), tmp_path / "m")
    with fails_with(ExitCode.NOT_FOUND, "ModelNotFound"):
        fetch_model(s3_store, s3_store.uri(f"{key_prefix}/none"), tmp_path / "m")
    with fails_with(ExitCode.NOT_FOUND, "BucketNotFound"):
        fetch_model(s3_store, "s3://no-such-bucket/model", tmp_path / "m")
    with fails_with(ExitCode.INVALID_INPUT, "InvalidUri"):
        fetch_model(s3_store, "https://example.com/model", tmp_path / "m")


def test_a_hub_out_of_reach_is_said_to_be(s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with fails_with(ExitCode.STORE_UNAVAILABLE, "HubUnavailable"):
        fetch_model(s3_store, "hf://openai/whisper-tiny.en@main", tmp_path / "m")


def test_a_disk_that_a_model_fills_is_not_taken_for_a_hub_out_of_reach(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object, **__: object) -> None:
        Path("/dev/full").write_bytes(b"x")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fill)
    with pytest.raises(OSError, match="No space left") as caught:
        fetch_model(s3_store, "hf://openai/whisper-tiny.en@main", tmp_path / "m")
    assert from_exception(caught.value, "evaluate").reason == "EphemeralStorageFull"


def test_names_that_lead_out_of_the_folder_are_refused(s3_store: Store, key_prefix: str, tmp_path: Path) -> None:
    entry = StoredObject("attune", f"{key_prefix}/../../../etc/evil", 1)
    with fails_with(ExitCode.INVALID_INPUT, "InvalidObjectName"):
        s3_store.download_objects([entry], f"{key_prefix}/", tmp_path / "d")


def test_wrong_keys_are_told_from_missing_rights(s3_server: S3Server) -> None:
    unknown = Store(s3_server.endpoint, "attune", access_key="nobody", secret_key="x" * 20)
    with fails_with(ExitCode.ACCESS_DENIED, "WrongCredentials"):
        unknown.read_bytes("a")
    wrong = Store(s3_server.endpoint, "attune", access_key=s3_server.access_key, secret_key="x" * 20)
    with fails_with(ExitCode.ACCESS_DENIED, "WrongCredentials") as caught:
        wrong.list("a")
    assert "x" * 20 not in str(caught.value)
    anonymous = Store(s3_server.endpoint, "attune")
    with fails_with(ExitCode.ACCESS_DENIED, "AccessDenied"):
        anonymous.read_bytes("a")
    with fails_with(ExitCode.ACCESS_DENIED, "WrongCredentials"):
        Store(s3_server.endpoint, "attune", access_key="only one")


def test_a_missing_bucket_is_named(s3_server: S3Server) -> None:
    store = s3_server.store("no-such-bucket")
    for call in (lambda: store.read_bytes("a"), lambda: store.list("a"), lambda: store.write_bytes("a", b"")):
        with fails_with(ExitCode.NOT_FOUND, "BucketNotFound") as caught:
            call()
        assert "no-such-bucket" in caught.value.message


def test_a_store_out_of_reach_is_tried_again_by_the_job_and_not_for_ever() -> None:
    store = Store(f"http://127.0.0.1:{free_port()}", "attune", access_key="a", secret_key="b" * 8)
    with fails_with(ExitCode.STORE_UNAVAILABLE, "StoreUnavailable") as caught:
        store.read_bytes("a")
    assert "endpoint" in caught.value.message


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "ftp://host", "http://", "http://host/path"])
def test_an_endpoint_must_be_an_address(endpoint: str) -> None:
    with fails_with(ExitCode.INVALID_INPUT, "InvalidEndpoint"):
        Store(endpoint, "attune")


def test_configuration_comes_from_the_environment(
    s3_server: S3Server, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    store = Store.from_environment()
    store.write_bytes(f"{key_prefix}/x", b"1")
    assert store.read_bytes(f"{key_prefix}/x") == b"1"
    monkeypatch.delenv("ATTUNE_STORE_BUCKET")
    with fails_with(ExitCode.INVALID_INPUT, "StoreNotConfigured") as caught:
        Store.from_environment()
    assert "no bucket" in caught.value.message
