"""A circuit breaker: what fails is left alone until a probe succeeds."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable

from halimede_ops.errors import (
    HalimedeError,
    ModelChanged,
    OutOfMemory,
    ServerError,
    ServerOverloaded,
)

MAX_FAILURES = 3
"""Consecutive failures that open a breaker."""
FIRST_PROBE_S = 0.25
LONGEST_PROBE_S = 1.5
"""Wait between two probes. It doubles from the first to the longest."""
PROBE_TIMEOUT_S = 2.0


class CircuitBreaker:
    """Opens after consecutive failures. A thread then probes until that succeeds, and closes it.

    The probe is the half-open state: no caller's request is spent on finding out. The thread ends
    with the breaker, also when that is dropped without `close`.

    Args:
        probe: given a time limit in seconds, raises unless requests would be answered.
        max_failures: consecutive failures that open the breaker.
    """

    def __init__(self, probe: Callable[[float], object], max_failures: int = MAX_FAILURES) -> None:
        self._probe = probe
        self._max_failures = max_failures
        self._failures = 0
        self._lock = threading.Lock()
        self._stop_probing: threading.Event | None = None
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether requests should go elsewhere."""
        return self._failures >= self._max_failures

    def record_success(self) -> None:
        """Count an answered request."""
        if self._failures:  # the common case takes no lock
            with self._lock:
                self._reset()

    def record_failure(self) -> None:
        """Count a failed request."""
        with self._lock:
            self._failures += 1
            if not self.is_open or self._stop_probing or self._closed:
                return
            stop = self._stop_probing = threading.Event()
        try:
            threading.Thread(
                target=_probe_until_it_succeeds,
                args=(weakref.ref(self), stop),
                name="halimede-probe",
                daemon=True,
            ).start()
        except RuntimeError:  # the interpreter is shutting down
            self._stop_probing = None

    def close(self) -> None:
        """Stop probing for good."""
        with self._lock:
            self._closed = True
            self._reset()

    def _reset(self) -> None:
        self._failures = 0
        if self._stop_probing is not None:
            self._stop_probing.set()
            self._stop_probing = None

    def _try_probe(self, stop: threading.Event) -> bool:
        try:
            self._probe(PROBE_TIMEOUT_S)
        except Exception:  # whatever it raised, the next probe may succeed
            return False
        with self._lock:
            if not stop.is_set():
                self._reset()
        return True


def _probe_until_it_succeeds(reference: weakref.ref[CircuitBreaker], stop: threading.Event) -> None:
    wait_s = FIRST_PROBE_S
    while not stop.wait(wait_s * random.uniform(0.7, 1.0)):
        breaker = reference()
        if breaker is None or breaker._try_probe(stop):
            return
        del breaker
        wait_s = min(2 * wait_s, LONGEST_PROBE_S)


def is_down(error: HalimedeError) -> bool:
    """Whether an error says that the server, not the request, is at fault."""
    return isinstance(error, ServerError) and not isinstance(
        error, (OutOfMemory, ModelChanged, ServerOverloaded)
    )
