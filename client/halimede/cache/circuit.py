"""A circuit: whether to use something that failed, or to leave it alone for a while."""

from __future__ import annotations

import logging
import random
import time

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0

log = logging.getLogger("halimede.cache")


class Circuit:
    """Open after a failure; the pause doubles with each failed try up to LONGEST_PAUSE_S."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0
        self._retry_at = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether the last use succeeded."""
        return self._failures == 0

    @property
    def may_try(self) -> bool:
        """Whether the last use succeeded, or the pause is over."""
        return self.is_closed or time.monotonic() >= self._retry_at

    def failed(self, error: BaseException) -> None:
        """Open the circuit for a while; failures while it is open are one failure."""
        if not self.may_try:
            return
        if self.is_closed:
            # The kind of the error alone: its message may name paths and addresses.
            log.warning(
                "cache: %s fail (%s); skipped until they succeed", self._name, type(error).__name__
            )
        pause_s = min(FIRST_PAUSE_S * 2**self._failures, LONGEST_PAUSE_S)
        self._failures += 1
        self._retry_at = time.monotonic() + pause_s * random.uniform(0.8, 1.0)

    def succeeded(self) -> None:
        """Close the circuit."""
        if not self.is_closed:
            log.info("cache: %s succeed again", self._name)
        self._failures = 0
