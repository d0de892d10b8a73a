"""Failures of remote providers as halimede's errors.

The messages repeat nothing that the server said: its words may hold a user's text or a key.
"""

from __future__ import annotations

from halimede_ops import errors


def timed_out(provider: str, timeout_s: float) -> errors.DeadlineExceeded:
    """Return the error for a provider that did not answer in time."""
    return errors.DeadlineExceeded(
        f"{provider} did not answer within {timeout_s:g} s. Raise timeout_s, or send less at once."
    )


def unreachable(provider: str) -> errors.ServerUnreachable:
    """Return the error for a provider that no connection reaches."""
    return errors.ServerUnreachable(
        f"{provider} cannot be reached. Check its URL, and that the server runs."
    )


def invalid_answer(provider: str, error: Exception) -> errors.ServerError:
    """Return the error for an answer that does not follow the provider's protocol."""
    return errors.ServerError(f"{provider} gave an invalid answer ({type(error).__name__}).")


def is_connection_error(error: Exception, http_library: str) -> bool:
    """Whether an error is the system's, or of the HTTP library that an SDK uses."""
    return isinstance(error, OSError) or type(error).__module__.startswith(http_library)


def from_status(provider: str, status: int) -> errors.HalimedeError:
    """Return the error for an HTTP status."""
    if status in (401, 403):
        return errors.AccessDenied(f"{provider} refuses the key, or needs one ({status}).")
    if status == 404:
        return errors.ModelNotFound(f"{provider} does not exist (404).")
    if status == 429:
        return errors.ServerOverloaded(f"{provider} asks for fewer requests (429).")
    if status in (408, 504):
        return errors.DeadlineExceeded(f"{provider} exceeded its own time limit ({status}).")
    if status >= 500:
        return errors.ServerError(f"{provider} failed ({status}). Send again later.")
    return errors.InvalidInput(
        f"{provider} refuses the request ({status}). A text may be empty or exceed the model's "
        "token limit, or an option may be unknown."
    )
