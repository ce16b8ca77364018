"""What can go wrong in a recipe, as an exit code, a reason, and a message that says what to change."""

import contextlib
import errno
import sys
from collections.abc import Iterator, Sequence

import urllib3.exceptions
from attune.contract.exitcode import ExitCode
from attune.contract.result import Failure, Rejection
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

MESSAGE_CHARACTERS = 1024

# What S3 servers call a key or a signature that they do not accept, as against one that lacks a right.
_WRONG_CREDENTIALS = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "ExpiredToken",
        "InvalidClientTokenId",
        "AuthorizationHeaderMalformed",
        "InvalidSecurity",
        "XAdminUserNotFound",  # versitygw
    }
)
_BUSY = frozenset({"InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted", "Busy"})


class RecipeFailure(Exception):  # noqa: N818 (a failure is an outcome of a recipe, not a defect in it)
    """Ends a recipe with an exit code, a CamelCase reason, and a message for the person who can mend it.

    The message goes into conditions and Events: it never quotes a transcript or a secret.
    """

    def __init__(self, code: ExitCode, reason: str, message: str, rejections: Sequence[Rejection] = ()) -> None:
        super().__init__(f"{reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.rejections = tuple(rejections)

    def to_failure(self) -> Failure:
        """Gives the form that the contract carries; a message that is too long is cut."""
        message = self.message
        if len(message) > MESSAGE_CHARACTERS:
            message = message[: MESSAGE_CHARACTERS - 3] + "..."
        return Failure(reason=self.reason, message=message, rejections=list(self.rejections[:16]))


class InvalidInput(RecipeFailure):
    """The input cannot be used as it is."""

    def __init__(self, reason: str, message: str, rejections: Sequence[Rejection] = ()) -> None:
        super().__init__(ExitCode.INVALID_INPUT, reason, message, rejections)


class AccessDenied(RecipeFailure):
    """The store or hub refuses these credentials."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(ExitCode.ACCESS_DENIED, reason, message)


class NotFound(RecipeFailure):
    """Something named is not there."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(ExitCode.NOT_FOUND, reason, message)


class StoreUnavailable(RecipeFailure):
    """The store or hub does not answer; trying again later may help."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(ExitCode.STORE_UNAVAILABLE, reason, message)


class OutOfMemory(RecipeFailure):
    """The work needs more memory than there is."""

    def __init__(self, message: str) -> None:
        super().__init__(ExitCode.OUT_OF_MEMORY, "OutOfMemory", message)


class DiskFull(RecipeFailure):
    """The work needs more disk than there is; another attempt would fill it again."""

    def __init__(self, recipe: str) -> None:
        super().__init__(
            ExitCode.INVALID_INPUT,
            "EphemeralStorageFull",
            f"{recipe} has filled the disk of its node: raise ephemeral-storage in spec.resources.requests, so that "
            "its pod gets a node with room for it, and in spec.resources.limits where it is bounded there",
        )


class UnsupportedModel(RecipeFailure):
    """The model is of an architecture that this image has no adapter for."""

    def __init__(self, message: str, reason: str = "UnsupportedModel") -> None:
        super().__init__(ExitCode.UNSUPPORTED_MODEL, reason, message)


class Terminated(RecipeFailure):
    """The pod was asked to end, and the recipe has saved what it needs to go on."""

    def __init__(self, message: str = "the Job was asked to end; it goes on from its checkpoint") -> None:
        super().__init__(ExitCode.TERMINATED, "Terminated", message)


class PeerLost(RecipeFailure):
    """A pod that trains together with this one is gone; what ended it says why, and costs the retry."""

    def __init__(self, indices: Sequence[int] = ()) -> None:
        which = f"pod {', '.join(map(str, indices))}" if indices else "a pod"
        message = f"{which} of this run is gone; all its pods go back to the last checkpoint"
        super().__init__(ExitCode.PEER_LOST, "PeerLost", message)


def from_store_error(error: BaseException, where: str) -> RecipeFailure | None:
    """Says what an error of the S3 client means; None where it is no such error.

    Args:
        error: what the minio client raised.
        where: the bucket or object that was asked for, as s3://bucket/key.
    """
    if isinstance(error, S3Error):
        code = error.code or "unknown"
        if code == "NoSuchBucket":
            return NotFound("BucketNotFound", f"the bucket of {where} does not exist; create it or correct its name")
        if code in {"NoSuchKey", "NotFound", "ResourceNotFound", "NoSuchObject"}:
            return NotFound("ObjectNotFound", f"{where} does not exist")
        if code in _WRONG_CREDENTIALS:
            return AccessDenied(
                "WrongCredentials",
                f"the store does not accept the access key or secret key for {where} ({code}); correct the Secret",
            )
        if code in {"AccessDenied", "AllAccessDisabled", "AccountProblem", "MethodNotAllowed"}:
            return AccessDenied(
                "AccessDenied", f"the credentials give no access to {where} ({code}); grant it, or use other ones"
            )
        if code in _BUSY:
            return StoreUnavailable("StoreUnavailable", f"the store could not serve {where} ({code})")
        return InvalidInput("StoreRefused", f"the store refused the request for {where} ({code})")
    if isinstance(error, InvalidResponseError):
        return StoreUnavailable(
            "StoreUnavailable",
            f"the answer for {where} is not S3's; check that the endpoint in the store's Secret is an S3 server",
        )
    if isinstance(error, (ServerError, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)):
        return StoreUnavailable(
            "StoreUnavailable",
            f"the store did not answer for {where} ({type(error).__name__}); check the endpoint in the store's Secret",
        )
    if isinstance(error, MinioException):
        return StoreUnavailable("StoreUnavailable", f"the store failed on {where} ({type(error).__name__})")
    return None


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turns errors of the S3 client into failures that name the bucket or object asked for."""
    try:
        yield
    except RecipeFailure:
        raise
    except Exception as error:
        failure = from_store_error(error, where)
        if failure is None:
            raise
        raise failure from error


_WHAT_TO_LOWER = {
    "finetune": (
        "lower spec.hyperparameters.maxBatchSeconds or batchSize (or spec.lora.rank), "
        "or raise the memory in spec.resources.limits"
    ),
    "evaluate": "raise the memory in spec.resources.limits, or evaluate a smaller model",
    "prepare": "raise the memory in spec.resources.limits, or split very long recordings",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an exception means that memory ran out, on the accelerator or on the host."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # never imported for this: prepare runs without it
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # torch's allocator for the CPU raises a bare RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


# Rust libraries give the system's words; torch, which streams its files, not even these.
_DISK_FULL = ("No space left on device", "PytorchStreamWriter failed writing", "basic_ios::clear: iostream error")


def is_disk_full(error: BaseException) -> bool:
    """Tells whether an exception, or one that led to it, means that there is no room left on a disk."""
    reached: BaseException | None = error
    while reached is not None:
        if isinstance(reached, OSError) and reached.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        if any(words in str(reached) for words in _DISK_FULL):
            return True
        reached = reached.__cause__ or reached.__context__
    return False


def from_exception(error: BaseException, recipe: str) -> RecipeFailure:
    """Turns whatever ended a recipe into a failure; what is unknown becomes InternalError with its type only."""
    if isinstance(error, RecipeFailure):
        return error
    if is_out_of_memory(error):
        hint = _WHAT_TO_LOWER.get(recipe, "raise the memory in spec.resources.limits")
        return OutOfMemory(f"{recipe} ran out of memory: {hint}")
    if is_disk_full(error):
        return DiskFull(recipe)
    return RecipeFailure(
        ExitCode.INTERNAL_ERROR,
        "InternalError",
        f"{recipe} ended with an unexpected {type(error).__name__}; the Job's log has the traceback",
    )
