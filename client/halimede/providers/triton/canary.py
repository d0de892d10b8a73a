"""A canary: a share of a model's requests is answered by the candidate that is served beside it.

Triton cannot split traffic, so the client does. A key falls on the same point between 0 and 1 each
time, and the candidate has the points below its share: a key that it answers stays with it while
the share grows. Each candidate has points of its own, or the same keys would try every new version.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Awaitable, Callable

import numpy as np

from halimede.inputs.content import serialise
from halimede.pipeline.latest import Latest
from halimede.pipeline.requests import together
from halimede.providers.base import Answer, Request, concatenate, reindexed
from halimede.results import ServedModel
from halimede_ops.errors import HalimedeError, InvalidInput

CHECK_S = 2.0
"""Age at which what was heard of a candidate is asked again: a changed share is followed by every
request that is sent so much later."""
Ask = Callable[[Request], Awaitable[Answer]]


class Watch:
    """What is heard of a candidate, asked again every CHECK_S seconds."""

    def __init__(self, read: Callable[[], Awaitable[ServedModel | None]]) -> None:
        self._reading = Latest(read)
        self._heard: ServedModel | None = None
        self._at = -math.inf

    async def look(self) -> ServedModel | None:
        """The candidate as it was at most CHECK_S ago; None: there is none."""
        if time.monotonic() - self._at >= CHECK_S:
            with contextlib.suppress(HalimedeError):  # the next look may succeed
                self._heard = await self._reading.read()
            self._at = time.monotonic()
        return self._heard


def may_answer(candidate: ServedModel, served: ServedModel) -> bool:
    """Whether a candidate answers a share of what the served model is asked: what a result says of
    its vectors must hold for those of both.
    """
    return (
        candidate.share > 0
        and candidate.is_alike(served)
        and (candidate.dims, candidate.max_tokens) == (served.dims, served.max_tokens)
        and candidate.version not in ("", served.version)
    )


def taken(request: Request, candidate: ServedModel) -> np.ndarray:
    """`[items]` bool: which items the candidate answers."""
    keys = [serialise(item) for item in request.inputs]
    if request.sticky_key is not None:
        keys = [request.sticky_key] * len(keys)
    return np.array([_point(key, candidate.version) < candidate.share for key in keys], np.bool_)


async def split(
    request: Request, candidate: ServedModel, by_candidate: Ask, by_served: Ask
) -> Answer:
    """The answer of both, each asked for its items; the served model answers for a candidate that
    fails, as one does that was just promoted or taken away.
    """
    takes = taken(request, candidate)

    async def candidate_or_served(part: Request) -> Answer:
        try:
            return await by_candidate(part)
        except InvalidInput:  # it is the items' fault
            raise
        except HalimedeError:
            return await by_served(part)

    async def answer(ask: Ask, part: np.ndarray) -> Answer:
        with reindexed(part.tolist()):
            return await ask(request.select(part))

    rows = [np.flatnonzero(takes), np.flatnonzero(~takes)]
    answers = await together(
        [
            functools.partial(answer, ask, part)
            for ask, part in zip((candidate_or_served, by_served), rows, strict=True)
            if len(part)
        ],
        len(rows),
    )
    return concatenate(answers).select(np.argsort(np.concatenate(rows)))


def _point(key: bytes, version: str) -> float:
    """Where a key falls for a version, from 0 to 1."""
    digest = hashlib.blake2b(key, digest_size=8, key=version.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64
