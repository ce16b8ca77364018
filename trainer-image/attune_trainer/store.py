"""The object store that Jobs read from and write to, and models fetched from it or from a model hub."""

import builtins
import copy
import hashlib
import io
import logging
import mimetypes
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

import urllib3
import urllib3.exceptions
from minio import Minio
from minio.credentials.providers import IamAwsProvider
from minio.error import S3Error, ServerError

from attune_trainer.failures import AccessDenied, InvalidInput, NotFound, StoreUnavailable, is_disk_full, store_errors

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_THREADS = 8
_ATTEMPTS = 3
_CHUNK_BYTES = 1 << 20
# Signing needs some region, and asking the server for it needs a right that few keys have.
_DEFAULT_REGION = "us-east-1"
# Weights that run code when they are read, or that nothing here reads.
UNSAFE_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".onnx",
    ".tflite",
    ".joblib",
    ".npy",
    ".npz",
)


@dataclass(frozen=True)
class StoredObject:
    """One object of a listing; key is within its bucket."""

    bucket: str
    key: str
    size: int  # bytes

    @property
    def uri(self) -> str:
        """The object as s3://bucket/key."""
        return f"s3://{self.bucket}/{self.key}"


class Store:
    """A bucket on an S3 server; keys and s3:// URIs (of any bucket on that server) name objects alike.

    Every call has timeouts and a bounded number of attempts, and raises RecipeFailure with ACCESS_DENIED, NOT_FOUND or
    STORE_UNAVAILABLE. Safe to use from several threads.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        *,
        region: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
    ) -> None:
        """Connects lazily.

        Args:
            endpoint: http://host:port or https://host.
            bucket: what plain keys are in.
            region: where the server wants one.
            access_key: absent with workload identity (AWS_WEB_IDENTITY_TOKEN_FILE or AWS_CONTAINER_CREDENTIALS_*) and
                for stores that serve anyone.
            secret_key: belongs to access_key.

        Raises:
            RecipeFailure: InvalidEndpoint, or WrongCredentials where only one of the keys is given.
        """
        parts = urlsplit(endpoint)
        if parts.scheme not in {"http", "https"} or not parts.netloc or parts.path.strip("/"):
            raise InvalidInput(
                "InvalidEndpoint", "the store's endpoint must be http://host[:port] or https://host[:port]"
            )
        if bool(access_key) != bool(secret_key):
            raise AccessDenied("WrongCredentials", "the store's Secret has only one of accessKey and secretKey")
        workload_identity = any(
            os.environ.get(name)
            for name in (
                "AWS_WEB_IDENTITY_TOKEN_FILE",
                "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            )
        )
        self.bucket = bucket
        self.endpoint = endpoint
        self.region = region
        self._client = Minio(
            parts.netloc,
            access_key=access_key or None,
            secret_key=secret_key or None,
            secure=parts.scheme == "https",
            region=region or _DEFAULT_REGION,
            credentials=IamAwsProvider() if workload_identity and not access_key else None,
            http_client=urllib3.PoolManager(
                maxsize=2 * _THREADS,
                timeout=urllib3.Timeout(connect=5, read=60),
                retries=urllib3.Retry(total=4, backoff_factor=0.3, status_forcelist=(500, 502, 503, 504)),
                ca_certs=os.environ.get("SSL_CERT_FILE"),
            ),
        )

    @classmethod
    def from_environment(
        cls, prefix: str = "ATTUNE_STORE_", *, bucket: str | None = None, like: "Store | None" = None
    ) -> "Store":
        """Reads <prefix>ENDPOINT, BUCKET, REGION, ACCESS_KEY and SECRET_KEY.

        Args:
            prefix: ATTUNE_STORE_ for the namespace's store, ATTUNE_SOURCE_<index>_ for a source's own.
            bucket: used instead of the environment's; a source's bucket is in its URI.
            like: gives endpoint and region where the environment has none.

        Raises:
            RecipeFailure: StoreNotConfigured, when endpoint or bucket is missing.
        """
        endpoint = os.environ.get(f"{prefix}ENDPOINT") or (like.endpoint if like else None)
        bucket = bucket or os.environ.get(f"{prefix}BUCKET")
        if not endpoint or not bucket:
            missing = "endpoint" if not endpoint else "bucket"
            raise InvalidInput("StoreNotConfigured", f"the store's Secret has no {missing} ({prefix}{missing.upper()})")
        return cls(
            endpoint,
            bucket,
            region=os.environ.get(f"{prefix}REGION") or (like.region if like else None),
            access_key=os.environ.get(f"{prefix}ACCESS_KEY"),
            secret_key=os.environ.get(f"{prefix}SECRET_KEY"),
        )

    def for_bucket(self, bucket: str) -> "Store":
        """Gives a store for another bucket of the same server, with the same credentials."""
        other = copy.copy(self)
        other.bucket = bucket
        return other

    def uri(self, key: str) -> str:
        """Names a key of this store's bucket as s3://bucket/key."""
        return f"s3://{self.bucket}/{key}"

    def locate(self, uri_or_key: str) -> tuple[str, str]:
        """Splits s3://bucket/key into bucket and key; a plain key is in this store's bucket."""
        if "://" not in uri_or_key:
            return self.bucket, uri_or_key
        scheme, _, rest = uri_or_key.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme != "s3" or not bucket:
            raise InvalidInput("InvalidUri", f"{uri_or_key} is no s3://bucket/key")
        return bucket, key

    def read_bytes(self, key: str) -> bytes:
        """Reads a whole object into memory.

        Raises:
            RecipeFailure: ObjectNotFound, BucketNotFound, AccessDenied, WrongCredentials, StoreUnavailable.
        """
        bucket, name = self.locate(key)

        def read() -> bytes:
            response = self._client.get_object(bucket, name)
            try:
                return bytes(response.data)
            finally:
                response.close()
                response.release_conn()

        return self._attempt(read, f"s3://{bucket}/{name}")

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Reads a part of an object into memory, less where it ends earlier; length is at least 1 byte."""
        bucket, name = self.locate(key)

        def read() -> bytes:
            response = self._client.get_object(bucket, name, offset=offset, length=length)
            try:
                return bytes(response.data)
            finally:
                response.close()
                response.release_conn()

        return self._attempt(read, f"s3://{bucket}/{name}")

    def write_bytes(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        """Writes an object in one piece, so that a reader sees all of it or nothing; gives its URI."""
        bucket, name = self.locate(key)
        where = f"s3://{bucket}/{name}"
        self._attempt(
            lambda: self._client.put_object(bucket, name, io.BytesIO(data), len(data), content_type=content_type), where
        )
        return where

    def exists(self, key: str) -> bool:
        """Tells whether there is such an object; a missing bucket holds none."""
        bucket, name = self.locate(key)
        try:
            self._attempt(lambda: self._client.stat_object(bucket, name), f"s3://{bucket}/{name}")
        except NotFound:
            return False
        return True

    def list_objects(self, prefix: str) -> Iterator[StoredObject]:
        """Lists the objects whose keys begin with a prefix, in the order of their keys, without folders' markers."""
        bucket, name = self.locate(prefix)
        with store_errors(f"s3://{bucket}/{name}"):
            for entry in self._client.list_objects(bucket, prefix=name, recursive=True):
                if entry.object_name and not entry.object_name.endswith("/"):
                    yield StoredObject(bucket=bucket, key=entry.object_name, size=entry.size or 0)

    def list(self, prefix: str) -> builtins.list[str]:
        """Lists the keys that begin with a prefix, in order."""
        return [entry.key for entry in self.list_objects(prefix)]

    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is no error."""
        bucket, name = self.locate(key)
        self._attempt(lambda: self._client.remove_object(bucket, name), f"s3://{bucket}/{name}")

    def download_file(self, key: str, path: Path) -> Path:
        """Downloads an object to a file, which appears only when it is whole."""
        bucket, name = self.locate(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")

        def download() -> None:
            response = self._client.get_object(bucket, name)
            try:
                with partial.open("wb") as file:
                    for chunk in response.stream(_CHUNK_BYTES):
                        file.write(chunk)
            finally:
                response.close()
                response.release_conn()

        try:
            self._attempt(download, f"s3://{bucket}/{name}")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def upload_file(self, path: Path, key: str, content_type: str | None = None) -> str:
        """Uploads a file; gives the object's URI."""
        bucket, name = self.locate(key)
        where = f"s3://{bucket}/{name}"
        kind = content_type or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        self._attempt(lambda: self._client.fput_object(bucket, name, str(path), content_type=kind), where)
        return where

    def download_prefix(self, uri_or_key: str, directory: Path) -> Path:
        """Downloads everything below a folder into a directory, several objects at a time.

        Raises:
            RecipeFailure: SourceEmpty where there is nothing below it, and as for download_file.
        """
        folder = uri_or_key if uri_or_key.endswith("/") else f"{uri_or_key}/"
        entries = [*self.list_objects(folder)]
        if not entries:
            bucket, name = self.locate(folder)
            raise NotFound("SourceEmpty", f"there is nothing below s3://{bucket}/{name}; correct the address")
        self.download_objects(entries, folder, directory)
        return directory

    def download_objects(self, entries: builtins.list[StoredObject], folder: str, directory: Path) -> None:
        """Downloads objects into a directory under their names relative to a folder, several at a time."""
        _, prefix = self.locate(folder)
        directory.mkdir(parents=True, exist_ok=True)

        def download(entry: StoredObject) -> None:
            self.download_file(entry.uri, _inside(directory, entry.key.removeprefix(prefix)))

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="download") as pool:
            for _ in pool.map(download, entries):
                pass

    def upload_directory(self, path: Path, key_prefix: str) -> str:
        """Uploads the regular files below a directory, several at a time; gives the folder's URI without a slash."""
        folder = key_prefix.rstrip("/")
        files = _regular_files(path)
        if not files:
            raise ValueError(f"{path} holds no file to upload")
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="upload") as pool:
            for _ in pool.map(lambda name: self.upload_file(path / name, f"{folder}/{name}"), files):
                pass
        bucket, name = self.locate(folder)
        return f"s3://{bucket}/{name}"

    def _attempt(self, call: Callable[[], _Answer], where: str) -> _Answer:
        """Repeats a call that was cut off in the middle of an answer; urllib3 itself repeats the ones that got none."""
        with store_errors(where):
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    return call()
                except (urllib3.exceptions.MaxRetryError, S3Error):
                    raise
                except (urllib3.exceptions.HTTPError, ServerError, ConnectionError) as error:
                    if attempt == _ATTEMPTS:
                        raise
                    _log.warning("store call repeated", extra={"attempt": attempt, "error": type(error).__name__})
                    _pause.wait(0.5 * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")


_pause = threading.Event()  # never set: wait() is a sleep that a test may cut short


def _inside(directory: Path, name: str) -> Path:
    """Joins a key to a directory, and refuses one that leads out of it."""
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise InvalidInput("InvalidObjectName", "an object's name leads out of its folder; rename it")
    return directory / relative


def _regular_files(path: Path) -> builtins.list[str]:
    """Lists the files below a directory by relative POSIX name, sorted; hidden ones are left out."""
    names = []
    for file in path.rglob("*"):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            names.append(relative.as_posix())
    return sorted(names)


def digest_file(path: Path) -> str:
    """Gives the SHA-256 of a file's contents as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_directory(path: Path) -> str:
    """Gives "sha256:<64 hex>" over names and contents of the regular files below a directory.

    The digest is SHA-256 over one line for each file, sorted by name: the relative POSIX name, NUL, the file's SHA-256
    in hexadecimal, newline. Hidden files do not count (download tools leave them), nor do times and modes.

    Raises:
        ValueError: when there is no file.
    """
    return _digest_files(path, _regular_files(path))


def digest_weights(path: Path) -> str:
    """Gives the same over a model folder's safetensors files alone.

    Raises:
        ValueError: when there is none.
    """
    return _digest_files(path, [name for name in _regular_files(path) if name.endswith(".safetensors")])


def _digest_files(path: Path, names: builtins.list[str]) -> str:
    if not names:
        raise ValueError(f"{path} holds no file to digest")
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name}\0{digest_file(path / name)}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def fetch_model(store: Store, uri: str, directory: Path, digest: str | None = None) -> Path:
    """Fetches a model's files into a directory and verifies them.

    Weights are safetensors only. Other weights that lie beside them, and program code, are not fetched.

    Args:
        store: for s3:// URIs, of whichever bucket.
        uri: s3://bucket/prefix or hf://organisation/name[@revision].
        directory: created; emptied first when it exists.
        digest: what digest_directory must give for the fetched files.

    Raises:
        RecipeFailure: ModelNotFound, NotSafetensors, DigestMismatch, AccessDenied, StoreUnavailable, HubUnavailable.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if uri.startswith("s3://"):
        _fetch_from_store(store, uri, directory)
    elif uri.startswith("hf://"):
        _fetch_from_hub(uri, directory)
    else:
        raise InvalidInput("InvalidUri", f"{uri} is neither s3://bucket/prefix nor hf://organisation/name[@revision]")
    if not any(name.endswith(".safetensors") for name in _regular_files(directory)):
        raise _not_safetensors(uri)
    if digest is not None:
        found = digest_directory(directory)
        if found != digest:
            raise InvalidInput(
                "DigestMismatch", f"the files of {uri} have digest {found}, expected {digest}; they were changed"
            )
    return directory


def _not_safetensors(uri: str) -> InvalidInput:
    return InvalidInput(
        "NotSafetensors",
        f"{uri} holds no *.safetensors weights; save the model with save_pretrained(..., safe_serialization=True)",
    )


def _is_refused(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name.endswith((*UNSAFE_SUFFIXES, ".py")) or any(part.startswith(".") for part in parts)


def _fetch_from_store(store: Store, uri: str, directory: Path) -> None:
    folder = uri if uri.endswith("/") else f"{uri}/"
    _, prefix = store.locate(folder)
    entries = list(store.list_objects(folder))
    if not entries:
        raise NotFound("ModelNotFound", f"there is no model at {uri}; correct the address or upload the model")
    wanted = [entry for entry in entries if not _is_refused(entry.key.removeprefix(prefix))]
    if not any(entry.key.endswith(".safetensors") for entry in wanted):
        raise _not_safetensors(uri)
    store.download_objects(wanted, folder, directory)


def _fetch_from_hub(uri: str, directory: Path) -> None:
    # Most Jobs need no hub, and its import takes a while.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = uri.removeprefix("hf://").partition("@")
    try:
        snapshot_download(
            name,
            revision=revision or None,
            local_dir=directory,
            ignore_patterns=[*(f"*{suffix}" for suffix in UNSAFE_SUFFIXES), "*.py", ".*"],
            max_workers=_THREADS,
            etag_timeout=10,
        )
    except GatedRepoError as error:
        raise AccessDenied("AccessDenied", f"{uri} is gated; accept its terms and give a token as HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise NotFound("ModelNotFound", f"{uri} has no such revision; correct what follows @") from error
    except RepositoryNotFoundError as error:
        raise NotFound("ModelNotFound", f"the hub has no {uri}, or it is private and HF_TOKEN is missing") from error
    except HFValidationError as error:
        raise InvalidInput("InvalidUri", f"{uri} is no hf://organisation/name[@revision]") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if is_disk_full(error):
            raise
        raise StoreUnavailable(
            "HubUnavailable",
            f"the model hub did not answer for {uri} ({type(error).__name__}); where there is no way out to it, "
            "put the model into the store and use s3://",
        ) from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)
