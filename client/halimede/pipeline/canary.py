"""A canary: the candidate that is served beside a model answers a share of its requests.

Triton cannot split traffic, so the client does. Each key is hashed to a point between 0 and 1, and
the candidate answers keys whose point is below its share. So a key stays with the candidate while
the share grows. The candidate's version is part of the hash, so that other keys try each candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from halimede.inputs.content import serialise
from halimede.pipeline.waiting import Flow, together
from halimede.providers.base import Answer, Request, concatenate, reindexed
from halimede.results import ServedModel
from halimede_ops.errors import HalimedeError, InvalidInput

REFRESH_S = 2.0
"""Age at which a candidate is read again, beside the calls: they follow a new share soon after."""
Ask = Callable[[Request, ServedModel], Flow[Answer]]
"""Returns a model's answer to a request."""


def may_answer(candidate: ServedModel, served: ServedModel) -> bool:
    """Whether a candidate may answer a share of the served model's requests.

    What a result says of its vectors must hold for the vectors of both.
    """
    return (
        candidate.share > 0
        and candidate.is_alike(served)
        and _facts(candidate) == _facts(served)
        and set(served.outputs) <= set(candidate.outputs)
        and candidate.version not in ("", served.version)
    )


def is_canary(request: Request, candidate: ServedModel) -> np.ndarray:
    """`[inputs]` bool: which inputs the candidate answers."""
    keys = [serialise(content) for content in request.inputs]
    if request.sticky_key is not None:
        keys = [request.sticky_key] * len(keys)
    return np.array([_point(key, candidate.version) < candidate.share for key in keys], np.bool_)


def split(request: Request, served: ServedModel, ask: Ask) -> Flow[Answer]:
    """Return the joined answer of a model and its candidate, each for its own inputs.

    The served model answers for a candidate that fails, such as one that was just promoted or
    unloaded.
    """
    candidate = served.candidate
    if candidate is None or not may_answer(candidate, served):
        return (yield from ask(request, served))
    by_canary = is_canary(request, candidate)

    def answer(rows: np.ndarray, model: ServedModel) -> Flow[Answer]:
        with reindexed(rows.tolist()):
            part = request.select(rows)
            try:
                return (yield from ask(part, model))
            except InvalidInput:  # the served model would refuse it as well
                raise
            except HalimedeError:
                if model is served:
                    raise
            return (yield from ask(part, served))

    parts = [(np.flatnonzero(by_canary), candidate), (np.flatnonzero(~by_canary), served)]
    answers = yield from together(
        [answer(rows, model) for rows, model in parts if len(rows)], len(parts)
    )
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return concatenate(answers).select(order)


def _facts(model: ServedModel) -> tuple[object, ...]:
    """What a result says of its rows, beside space and precision."""
    return model.kind, model.dims, model.max_tokens, model.query_tokens, model.labels


def _point(key: bytes, version: str) -> float:
    """Hash a key and a version to a point from 0 to 1."""
    digest = hashlib.blake2b(key, digest_size=8, key=version.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64
