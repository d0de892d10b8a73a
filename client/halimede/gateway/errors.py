"""Problems: what went wrong with a request, as an HTTP status and words that no text is in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from halimede_ops import errors
from halimede_ops.errors import HalimedeError

OVERLOAD_WAIT_S = 1.0
"""Seconds after which a caller may send again, where a server does not say."""

STATUSES: Mapping[type[HalimedeError], int] = {
    errors.InvalidInput: 400,
    errors.ImageTooLarge: 413,
    errors.ModelNotFound: 404,
    errors.UnsupportedInput: 400,
    errors.ServerOverloaded: 429,
    errors.ServerUnreachable: 503,
    errors.DeadlineExceeded: 504,
    errors.OutOfMemory: 503,
    errors.ModelChanged: 503,
    errors.SpaceRefused: 503,
    errors.MissingExtra: 501,
    errors.RequestCancelled: 499,
    errors.ServerError: 503,
    errors.AccessDenied: 502,
}
"""Class of an error → status. The nearest class in its tree counts; of any other it is 500."""


@dataclasses.dataclass(eq=False)
class Problem(Exception):
    """Why a request is refused. Each dialect has a shape for it."""

    status: int
    message: str
    code: str = ""
    """A word for programs, such as `model_not_found`. Default: that of the status."""
    param: str | None = None
    """The field of the body that is wrong."""
    retry_after_s: float | None = None
    """Seconds after which to send again. None: the same request fails again."""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def word(self) -> str:
        """`code`, or the word of the status."""
        return self.code or WORDS.get(self.status, "server_error")


WORDS: Mapping[int, str] = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "space_changed",
    413: "request_too_large",
    422: "invalid_request",
    429: "rate_limit_exceeded",
    501: "not_supported",
    503: "unavailable",
    504: "timeout",
}
"""Status → the word for it."""


def problem_of(error: HalimedeError) -> Problem:
    """Return an error of the client as a problem."""
    status = next(
        (STATUSES[base] for base in type(error).__mro__ if base in STATUSES),
        500,
    )
    if status in (500, 502):
        # Its words are about our servers, and are in the log.
        return Problem(status, "The model's server failed on this request.", "server_error")
    retry = (error.retry_after_s or OVERLOAD_WAIT_S) if error.retryable else None
    code = "model_not_found" if status == 404 else ""
    return Problem(status, str(error), code, retry_after_s=retry)
