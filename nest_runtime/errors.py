"""Every error this package raises on purpose, in one tree.

A message names what was found and what was expected; the hint says what to do.
The command line prints both and exits with ``exit_status``: 1 failed, 2 wrong usage,
3 refused for trust. Nothing here imports torch, so that ``--help`` stays quick.
"""

from __future__ import annotations


def reason_of(error: Exception) -> str:
    """Why something failed, for a message that names the file itself: a system's error without its number and path."""
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)


class NestError(Exception):
    """Base of all errors of nest-runtime.

    Args:
        message: what is wrong, with the values found and expected.
        hint: what the user can do about it; one sentence.
    """

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(NestError):
    """The command or call was put together wrongly."""

    exit_status = 2


class DataError(NestError):
    """A prompt file, template file or result file cannot be used as it is."""


class ModelError(NestError):
    """A model cannot be found, loaded or used."""


class UnknownArchitecture(ModelError):
    """No FFN projections are known for this model's architecture."""


class PatchFormatError(NestError):
    """A patch file breaks the format of docs/reference/patch-format.md; nothing was loaded."""


class PatchNotFound(NestError):
    """A patch reference names nothing that can be found."""


class PatchNotFinite(NestError):
    """Under a patch the model computes NaN or infinity: it would spoil the answers beside it."""


class StoreError(NestError):
    """The local patch store cannot do what was asked."""


class EngineError(NestError):
    """The inference engine failed or is not running."""


class AdminApiOff(EngineError):
    """A server has no admin API where it was asked."""


def port_taken(host: str, number: int) -> EngineError:
    """The error for a port that somebody else listens on."""
    return EngineError(
        f"port {number} on {host} is in use", "stop the other server, or give another --port; 0 takes a free one"
    )


class QueueFull(EngineError):
    """More requests wait than the server holds; ``retry_after`` is a guess in whole seconds."""

    def __init__(self, message: str, hint: str = "", *, retry_after: int = 1) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class Draining(EngineError):
    """The server is shutting down and takes no new requests."""


class PatchReplaced(EngineError):
    """The patch was replaced at once, and the client had already seen a part of the answer under it."""


class Stopped(EngineError):
    """The active patch is revoked, and there is no other to turn to: nothing is answered."""


class TrainingError(NestError):
    """Training cannot start or continue."""


class EvaluationError(NestError):
    """An evaluation cannot start or continue."""


class ExportError(NestError):
    """A patch cannot be exported to the format asked for."""


class HubError(NestError):
    """The Hub or a mirror could not be reached, or refused."""


class RepoMissing(HubError):
    """There is no such repository, or none that this user may see: the Hub does not tell the two apart."""


class AdmissionRefused(NestError):
    """A patch that was offered did not do well enough in the admission test; it was not switched to."""


class TrustError(NestError):
    """Refused for trust: base of everything that exits with status 3."""

    exit_status = 3


class DigestMismatch(TrustError):
    """Content does not match the digest it claims."""


class BaseMismatch(TrustError):
    """A patch was made for another base model than the one at hand."""


class SiteMismatch(BaseMismatch):
    """A patch names a site that the model lacks, or of another shape: it was made for another base."""


class SignatureError(TrustError):
    """A signature is missing, invalid, or made by a key that is not trusted."""


class Revoked(TrustError):
    """The patch has been revoked by its publisher."""


class Downgrade(TrustError):
    """An older patch than one already accepted was offered without permission."""


class ClaimsRefused(TrustError):
    """A patch lacks claims that are demanded of it, or its claims do not hold."""


class Expired(TrustError):
    """A signed channel file is past its date: its publisher no longer stands by it."""
