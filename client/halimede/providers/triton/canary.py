"""A canary: the candidate that is served beside a model answers a share of its requests.

Triton cannot split traffic, so the client does. Each key is hashed to a point between 0 and 1, and
the candidate answers keys whose point is below its share. So a key stays with the candidate while
the share grows. The candidate's version is part of the hash, so that other keys try each candidate.
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
"""Seconds between two reads of a candidate's config: every later request follows a new share."""
Ask = Callable[[Request], Awaitable[Answer]]


class Watch:
    """A model's candidate, read again every CHECK_S seconds."""

    def __init__(self, read: Callable[[], Awaitable[ServedModel | None]]) -> None:
        self._reader = Latest(read)
        self._candidate: ServedModel | None = None
        self._read_at = -math.inf

    async def candidate(self) -> ServedModel | None:
        """Return the candidate as it was at most CHECK_S ago. None if there is none."""
        if time.monotonic() - self._read_at >= CHECK_S:
            with contextlib.suppress(HalimedeError):  # the next read may succeed
                self._candidate = await self._reader.read()
            self._read_at = time.monotonic()
        return self._candidate


def may_answer(candidate: ServedModel, served: ServedModel) -> bool:
    """Whether a candidate may answer a share of the served model's requests.

    What a result says of its vectors must hold for the vectors of both.
    """
    return (
        candidate.share > 0
        and candidate.is_alike(served)
        and (candidate.dims, candidate.max_tokens) == (served.dims, served.max_tokens)
        and candidate.version not in ("", served.version)
    )


def is_canary(request: Request, candidate: ServedModel) -> np.ndarray:
    """`[inputs]` bool: which inputs the candidate answers."""
    keys = [serialise(content) for content in request.inputs]
    if request.sticky_key is not None:
        keys = [request.sticky_key] * len(keys)
    return np.array([_point(key, candidate.version) < candidate.share for key in keys], np.bool_)


async def split(
    request: Request, candidate: ServedModel, by_candidate: Ask, by_served: Ask
) -> Answer:
    """Return the joined answer of both, each for its own inputs.

    The served model answers for a candidate that fails, such as one that was just promoted or
    unloaded.
    """
    by_canary = is_canary(request, candidate)

    async def candidate_or_served(part: Request) -> Answer:
        try:
            return await by_candidate(part)
        except InvalidInput:  # the served model would refuse it as well
            raise
        except HalimedeError:
            return await by_served(part)

    async def answer(ask: Ask, part: np.ndarray) -> Answer:
        with reindexed(part.tolist()):
            return await ask(request.select(part))

    rows = [np.flatnonzero(by_canary), np.flatnonzero(~by_canary)]
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
    """Hash a key and a version to a point from 0 to 1."""
    digest = hashlib.blake2b(key, digest_size=8, key=version.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64
