"""Every error halimede raises, and what each means on Triton's wire.

HalimedeError                  INTERNAL
├── InvalidInput               INVALID_ARG   the caller must change the request
│   ├── InvalidText            not UTF-8, not a string, too large
│   ├── InvalidImage           of no known format, damaged, animated, empty
│   ├── ImageTooLarge          more bytes or pixels than are taken
│   ├── UrlRefused             not https, or of an address that is not public
│   ├── FetchFailed            a url gave no image, or not in time
│   ├── UnknownInputType       no such prompt
│   ├── InvalidDimensions      outside 1 … the model's dims
│   └── InvalidConfig          a configuration is not what it must be
├── ModelNotFound              NOT_FOUND     no such model on this server
├── ServerError                UNAVAILABLE   the same request may succeed later
│   ├── ServerUnreachable      nothing answers at the address, or it died mid-request
│   ├── ServerOverloaded       a queue is full, or a rate limit is reached
│   ├── DeadlineExceeded       no answer within `timeout_s`
│   ├── OutOfMemory            fewer texts at once may fit
│   └── ModelChanged           another model now has this name
├── UnsupportedInput           INVALID_ARG   a model embeds texts, not images, or the reverse
├── RequestCancelled           CANCELLED     the caller went away before its turn came
├── AccessDenied               INTERNAL      a provider refuses the key
├── SpaceRefused               INTERNAL      no provider of the wanted space could answer
├── MissingExtra               INTERNAL      an optional package is not installed
├── InvalidModel               INVALID_ARG   a model folder or a file in it is not what it must be
│   └── UntrustedCode          it carries Python code that nobody has accepted
├── BuildError                 INTERNAL      a build step failed; the repository is as it was
│   ├── DownloadError          no source gave the files
│   │   └── ChecksumMismatch   the bytes are not the published ones
│   ├── LicenceNotAccepted     the model's licence must be accepted by name first
│   └── QualityError           a precision misses the bar of its own check
├── ServeError                 INTERNAL      the server could not be started
└── DeployError                INTERNAL      a version was not deployed; the one before serves on
    └── SpaceChange            its vectors could not be compared with those before

`code` is the name of a Triton error code; `retryable` says whether the same request can
succeed on a second try. Messages name what was given and what to do; they never hold a
user's text or a path of the server's.
"""

from __future__ import annotations

from typing import ClassVar, Self


class HalimedeError(Exception):
    """Root of the tree: catch this to catch everything halimede raises on purpose."""

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    index: int | None = None
    """Index of the text, image or pair that the error is about. None: it is not about one."""


class InvalidInput(HalimedeError, ValueError):
    """The request itself is wrong: change it before sending it again.

    With a `subject` the message begins with it and the index: `InvalidText("is not valid UTF-8.",
    subject="text", index=3)` reads "text 3 is not valid UTF-8."
    """

    code = "INVALID_ARG"

    def __init__(self, message: str, *, subject: str = "", index: int | None = None) -> None:
        super().__init__(message)
        self.subject = subject
        self.index = index

    def __str__(self) -> str:
        message = super().__str__()
        return f"{self.subject} {self.index} {message}" if self.subject else message

    def at(self, index: int) -> Self:
        """Return the same error about the input at another index."""
        return type(self)(self.args[0], subject=self.subject, index=index)


class InvalidText(InvalidInput):
    """A text is not valid UTF-8, not a string, or larger than the model accepts."""


class InvalidImage(InvalidInput):
    """An image is of no format that is decoded, damaged, animated or empty."""


class ImageTooLarge(InvalidInput):
    """An image has more bytes or pixels than the model takes."""


class UrlRefused(InvalidInput):
    """A url is not fetched: not https, or it leads to an address that is not public."""


class FetchFailed(InvalidInput):
    """A url gave no image, or not in time; it may later."""

    retryable = True


class UnknownInputType(InvalidInput):
    """`input_type` names no prompt of the model."""


class InvalidDimensions(InvalidInput):
    """`dimensions` lies outside 1 … the model's dims."""


class InvalidConfig(InvalidInput):
    """A configuration names an unknown key, or a value that cannot be."""


class ModelNotFound(HalimedeError):
    """The server has no model of this name, or has not loaded it."""

    code = "NOT_FOUND"


class ServerError(HalimedeError):
    """The server could not answer now; the same request may succeed later."""

    code = "UNAVAILABLE"
    retryable = True


class ServerUnreachable(ServerError):
    """Nothing answers at the address, or the connection broke mid-request."""


class ServerOverloaded(ServerError):
    """A queue on the server is full: back off, then send the request again."""


class DeadlineExceeded(ServerError):
    """No answer came within `timeout_s`."""


class OutOfMemory(ServerError):
    """The engine had no memory for this many texts at once: send fewer."""


class ModelChanged(ServerError):
    """The model under this name is not the one it was: describe it again, then send again."""


class UnsupportedInput(HalimedeError):
    """A model embeds items of another kind, such as texts and not images."""

    code = "INVALID_ARG"


class RequestCancelled(HalimedeError):
    """The caller cancelled the request before its turn came: it was not run."""

    code = "CANCELLED"


class AccessDenied(HalimedeError):
    """A provider refuses the key, or wants one."""


class SpaceRefused(HalimedeError):
    """The providers left give vectors of another space or too low a precision."""


class MissingExtra(HalimedeError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class InvalidModel(HalimedeError):
    """A model folder or one of its files is not what it must be."""

    code = "INVALID_ARG"


class UntrustedCode(InvalidModel):
    """A model folder carries Python code of its own and nobody has accepted to run it."""


class BuildError(HalimedeError):
    """A build step failed; the repository is as it was before."""


class DownloadError(BuildError):
    """No source of the catalogue row gave the model's files."""


class ChecksumMismatch(DownloadError):
    """A downloaded file is not the published one."""


class LicenceNotAccepted(BuildError):
    """The model's licence restricts its use: it must be accepted by name first."""


class QualityError(BuildError):
    """A built precision misses the bar of its own check."""


class ServeError(HalimedeError):
    """The server could not be started."""


class DeployError(HalimedeError):
    """A version of a model could not be deployed; what was served is served on."""


class SpaceChange(DeployError):
    """A version gives vectors of another space, which nobody has accepted."""
