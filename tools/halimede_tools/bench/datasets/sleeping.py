"""A provider that takes as long as a model, and no CPU: for the growth of a cluster on one machine.

Its vectors are hash embeddings. One process embeds one text after another.
"""

from __future__ import annotations

import threading
import time

from halimede import Embedder
from halimede.pipeline.pool import Pool
from halimede.pipeline.waiting import Future
from halimede.providers.base import Answer, Request
from halimede.providers.hash import Hash, Options

CALLS = 8
"""Requests that wait for their turn."""


class SleepingHash(Hash):
    """Hash embeddings, each after a sleep."""

    def __init__(self, text_s: float) -> None:
        super().__init__(Options.model_validate({"model_id": "sleeping"}))
        self._text_s = text_s
        self._turn = threading.Lock()
        self._calls = Pool(CALLS, "sleep")

    def __reduce__(self) -> tuple[type[SleepingHash], tuple[float]]:
        return SleepingHash, (self._text_s,)

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        """Sleep for as long as a model computes, then answer."""
        return self._calls.submit(self._slept, request)

    def close(self) -> None:
        """End the threads."""
        self._calls.close()
        super().close()

    def _slept(self, request: Request) -> Answer:
        with self._turn:
            time.sleep(len(request.inputs) * self._text_s)
        return self._answer(request)


def sleeping(texts_per_s: float) -> Embedder:
    """Return an embedder that embeds so many texts a second."""
    return Embedder(providers=[SleepingHash(1 / texts_per_s)])
