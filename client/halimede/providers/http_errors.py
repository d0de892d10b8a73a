"""Failures of remote providers as halimede's errors.

The messages repeat nothing that the server said: its words may hold a user's text or a key.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping

from halimede.providers.proxies import proxy_for
from halimede_ops import errors

OVERLOADED = (429, 529)
TIMED_OUT = (408, 504, 524)
PASSING = (409, 423, 425)
"""Statuses below 500 after which the same request can succeed."""

LASTING = (501, 505, 506, 510, 511)
"""Statuses from 500 of a server that will not answer the same request otherwise."""


def timed_out(provider: str, timeout_s: float) -> errors.DeadlineExceeded:
    """Return the error for a provider that did not answer in time."""
    return errors.DeadlineExceeded(
        f"{provider} did not answer within {timeout_s:g} s. Raise timeout_s, or send less at once."
    )


def unreachable(provider: str, url: str | None = None) -> errors.ServerUnreachable:
    """Return the error for a provider that no connection to its URL reaches."""
    proxy = proxy_for(url) if url else None
    if proxy is not None:
        return errors.ServerUnreachable(
            f"{provider} cannot be reached through the proxy {proxy} of the environment. Check the "
            "proxy, or add the host to no_proxy."
        )
    return errors.ServerUnreachable(
        f"{provider} cannot be reached. Check its URL, and that the server runs."
    )


def invalid_answer(provider: str, error: Exception) -> errors.HalimedeError:
    """Return the error for an answer that does not follow the provider's protocol."""
    return errors.HalimedeError(
        f"{provider} answers, but not as the embedding API that it should be "
        f"({type(error).__name__}). Check its url."
    )


def is_connection_error(error: Exception, http_library: str) -> bool:
    """Whether an error is the system's, or of the HTTP library that an SDK uses."""
    return isinstance(error, OSError) or type(error).__module__.startswith(http_library)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in a `Retry-After` header, a number or a date. None: there is none."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value[:9])
    try:
        moment = email.utils.parsedate_to_datetime(value)
        return max(0.0, moment.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def from_status(
    provider: str, status: int, headers: Mapping[str, str] | None = None
) -> errors.HalimedeError:
    """Return the error for an HTTP status other than 200, and the headers of its response."""
    error = _from_status(provider, status)
    if error.retryable and headers is not None:
        error.retry_after_s = retry_after_s(headers)
    return error


def _from_status(provider: str, status: int) -> errors.HalimedeError:
    if status in (401, 403):
        return errors.AccessDenied(f"{provider} refuses the key, or needs one ({status}).")
    if status == 407:
        return errors.AccessDenied(f"the proxy in front of {provider} needs a password (407).")
    if status in (404, 410):
        return errors.ModelNotFound(f"{provider} does not exist ({status}).")
    if status == 413:
        return errors.InvalidInput(f"{provider} refuses the request's size (413). Send less.")
    if status in OVERLOADED:
        return errors.ServerOverloaded(f"{provider} asks for fewer requests ({status}).")
    if status in TIMED_OUT:
        return errors.DeadlineExceeded(f"{provider} exceeded its own time limit ({status}).")
    if status in (502, 503):
        return errors.ServerUnreachable(f"{provider} cannot be reached now ({status}). Send again.")
    if status in PASSING or (status >= 500 and status not in LASTING):
        return errors.ServerError(f"{provider} failed ({status}). Send again later.")
    if status in (400, 422):
        return errors.InvalidInput(
            f"{provider} refuses the request ({status}). A text may be empty or exceed the model's "
            "token limit, or an option may be unknown."
        )
    return errors.HalimedeError(
        f"{provider} answers {status}, as no embedding API does. Check its url."
    )
