"""Every error that halimede raises, with its Triton error code and whether a retry can help.

                               Triton code   retryable   raised when
HalimedeError                  INTERNAL      no          (the root of the tree)
├── InvalidInput               INVALID_ARG   no          the request must be changed
│   ├── InvalidText            INVALID_ARG   no          a text is not UTF-8, or too large
│   ├── InvalidImage           INVALID_ARG   no          unknown format, damaged, animated, empty
│   ├── ImageTooLarge          INVALID_ARG   no          too many bytes or pixels
│   ├── UrlRefused             INVALID_ARG   no          a URL is not https, or not public
│   ├── FetchFailed            INVALID_ARG   yes         a URL gave no image, or not in time
│   ├── UnknownInputType       INVALID_ARG   no          the model has no prompt of this name
│   ├── InvalidDimensions      INVALID_ARG   no          outside 1 … the model's dims
│   └── InvalidConfig          INVALID_ARG   no          an unknown key or an invalid value
├── ModelNotFound              NOT_FOUND     no          the server has no such model
├── ServerError                UNAVAILABLE   yes         the server could not answer now
│   ├── ServerUnreachable      UNAVAILABLE   yes         no connection, or it broke
│   ├── ServerOverloaded       UNAVAILABLE   yes         a queue is full, or a rate limit is reached
│   ├── DeadlineExceeded       UNAVAILABLE   yes         no answer within `timeout_s`
│   ├── OutOfMemory            UNAVAILABLE   yes         too many texts at once for the memory
│   └── ModelChanged           UNAVAILABLE   yes         another model has this name now
├── NonFiniteVector            INTERNAL      no          a model gave NaN or infinity for an input
├── UnsupportedInput           INVALID_ARG   no          a model embeds no inputs of this kind
├── RequestCancelled           CANCELLED     no          the caller cancelled before the run
├── AccessDenied               INTERNAL      no          a provider refuses or requires a key
├── SpaceRefused               INTERNAL      no          no provider of the required space is left
├── MissingExtra               INTERNAL      no          an optional package is not installed
├── InvalidModel               INVALID_ARG   no          a model's file is missing, damaged or wrong
│   └── UntrustedCode          INVALID_ARG   no          a model carries Python code
├── BuildError                 INTERNAL      no          a build step failed
│   ├── DownloadError          INTERNAL      no          no source gave the model's files
│   │   └── ChecksumMismatch   INTERNAL      no          a file differs from the published one
│   ├── LicenceNotAccepted     INTERNAL      no          the licence must be accepted by name
│   └── QualityError           INTERNAL      no          a precision misses its quality bar
├── ServeError                 INTERNAL      no          the server could not be started
└── DeployError                INTERNAL      no          a version was not deployed
    └── SpaceChange            INTERNAL      no          a version has vectors of another space

`code` is the name of a Triton error code: backends answer with it, and the client raises the same
class again. `retryable` says whether the same request can succeed on a second try.

A message says what was wrong, what was given and what to do. It never contains a user's text or a
path of the server.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

Located = TypeVar("Located", bound="HalimedeError")


class HalimedeError(Exception):
    """The root of the tree: catch it to catch every error that halimede raises on purpose.

    With a `subject` the message begins with it and the index: `InvalidText("is not valid UTF-8.",
    subject="text", index=3)` reads "text 3 is not valid UTF-8."
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    index: int | None
    """Index of the text, image or pair that the error is about. None: it is not about one."""
    retry_after_s: float | None = None
    """Seconds after which the server asks to send again (`Retry-After`). None: it does not say."""

    def __init__(self, message: str, *, subject: str = "", index: int | None = None) -> None:
        super().__init__(message)
        self.subject = subject
        self.index = index

    def __str__(self) -> str:
        message = super().__str__()
        return f"{self.subject} {self.index} {message}" if self.subject else message

    def at(self: Located, index: int) -> Located:
        """Return the same error about the input at another index."""
        return type(self)(self.args[0], subject=self.subject, index=index)


class InvalidInput(HalimedeError, ValueError):
    """The request is invalid: change it before you send it again."""

    code = "INVALID_ARG"


class InvalidText(InvalidInput):
    """A text is not valid UTF-8, is not a string, or is larger than the model accepts."""


class InvalidImage(InvalidInput):
    """An image has an unsupported format, or is damaged, animated or empty."""


class ImageTooLarge(InvalidInput):
    """An image has more bytes or pixels than the model accepts."""


class UrlRefused(InvalidInput):
    """A URL is not https, or it leads to an address that is not public."""


class FetchFailed(InvalidInput):
    """A URL gave no image, or not in time. A later try may succeed."""

    retryable = True


class UnknownInputType(InvalidInput):
    """The model has no prompt with the name `input_type`."""


class InvalidDimensions(InvalidInput):
    """`dimensions` is outside 1 … the model's dims."""


class InvalidConfig(InvalidInput):
    """A configuration has an unknown key or an invalid value."""


class ModelNotFound(HalimedeError):
    """The server has no model of this name, or has not loaded it."""

    code = "NOT_FOUND"


class ServerError(HalimedeError):
    """The server could not answer now. The same request may succeed later."""

    code = "UNAVAILABLE"
    retryable = True


class ServerUnreachable(ServerError):
    """No server answers at the address, or the connection broke during a request."""


class ServerOverloaded(ServerError):
    """A queue on the server is full, or a rate limit is reached. Wait, then send again."""


class DeadlineExceeded(ServerError):
    """No answer came within `timeout_s`."""


class OutOfMemory(ServerError):
    """The engine has not enough memory for this many texts at once. Send fewer."""


class ModelChanged(ServerError):
    """The name belongs to another model now. Describe the model again, then send again."""


class NonFiniteVector(HalimedeError):
    """The model's vector of an input has NaN or infinity. It is not answered and not cached."""


class UnsupportedInput(HalimedeError):
    """The model does not embed inputs of this kind, for example images."""

    code = "INVALID_ARG"


class RequestCancelled(HalimedeError):
    """The caller cancelled the request before it was run."""

    code = "CANCELLED"


class AccessDenied(HalimedeError):
    """A provider refuses the key, or requires one."""


class SpaceRefused(HalimedeError):
    """The remaining providers have another space, or too low a precision."""


class MissingExtra(HalimedeError, ImportError):
    """An optional package is not installed. The message names the extra that installs it."""


class InvalidModel(HalimedeError):
    """A file of a model is missing, damaged or wrong."""

    code = "INVALID_ARG"


class UntrustedCode(InvalidModel):
    """A model folder contains Python code, and the user has not agreed to run it."""


class BuildError(HalimedeError):
    """A build step failed. The repository is unchanged."""


class DownloadError(BuildError):
    """None of the catalogue's sources for the model gave its files."""


class ChecksumMismatch(DownloadError):
    """A downloaded file differs from the published one."""


class LicenceNotAccepted(BuildError):
    """The model's licence restricts its use. The user must accept it by name first."""


class QualityError(BuildError):
    """A built precision misses its quality bar."""


class ServeError(HalimedeError):
    """The server could not be started."""


class DeployError(HalimedeError):
    """A version of a model could not be deployed. The version before is still served."""


class SpaceChange(DeployError):
    """A version has vectors of another space, and the user has not accepted the change."""
