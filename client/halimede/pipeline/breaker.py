"""A circuit breaker: what fails is left alone until a probe succeeds."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence

from halimede_ops.errors import (
    DeadlineExceeded,
    HalimedeError,
    ModelChanged,
    OutOfMemory,
    ServerError,
    ServerOverloaded,
)

FAILURES = 3
"""Failures in a row that open a breaker."""
PROBE_FIRST_S = 0.25
PROBE_LONGEST_S = 1.5
"""Wait between two probes: it doubles from the first to the longest."""
PROBE_TIMEOUT_S = 2.0


class Breaker:
    """Open after some failures in a row; then `probe` is asked until it succeeds: that closes it.

    The probe is the half-open state: no caller's request is spent on finding out.
    """

    def __init__(
        self, probe: Callable[[float], Awaitable[object]], most_failures: int = FAILURES
    ) -> None:
        self._probe = probe
        self._most_failures = most_failures
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether requests should go elsewhere."""
        return self._failures >= self._most_failures

    def succeeded(self) -> None:
        """A request was answered."""
        self._failures = 0
        self._stop()

    def failed(self) -> None:
        """A request was not answered."""
        self._failures += 1
        if self.is_open and self._probing is None:
            self._probing = asyncio.ensure_future(self._probe_until_it_answers())

    async def close(self) -> None:
        """Stop probing."""
        probing = self._probing
        self._stop()
        if probing is not None:
            await asyncio.wait({probing})

    def _stop(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            self._probing = None

    async def _probe_until_it_answers(self) -> None:
        wait_s = PROBE_FIRST_S
        while True:
            await asyncio.sleep(wait_s * random.uniform(0.7, 1.0))
            with contextlib.suppress(HalimedeError, asyncio.TimeoutError):
                await asyncio.wait_for(self._probe(PROBE_TIMEOUT_S), PROBE_TIMEOUT_S)
                break
            wait_s = min(2 * wait_s, PROBE_LONGEST_S)
        self._failures = 0
        self._probing = None


class Breakers:
    """The breakers of several servers of one provider, seen as one: open when all are.

    The provider tells each server's own breaker how its requests went, so nothing is told here.
    """

    def __init__(self, breakers: Sequence[Breaker]) -> None:
        self._breakers = breakers

    @property
    def is_open(self) -> bool:
        """Whether requests should go elsewhere."""
        return all(breaker.is_open for breaker in self._breakers)

    def succeeded(self) -> None:
        """Do nothing: a server's own breaker knows."""

    def failed(self) -> None:
        """Do nothing: a server's own breaker knows."""

    async def close(self) -> None:
        """Stop probing."""
        await asyncio.gather(*[breaker.close() for breaker in self._breakers])


def is_down(error: HalimedeError) -> bool:
    """Whether an error says that the server, not the request, is at fault."""
    if isinstance(error, DeadlineExceeded):
        return True
    return isinstance(error, ServerError) and not isinstance(
        error, (OutOfMemory, ModelChanged, ServerOverloaded)
    )
