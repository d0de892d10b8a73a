"""Hash embeddings: vectors from a hash of the bytes, for development and tests.

The same text gives the same vector everywhere. Vectors carry no meaning: those of two different
texts are about orthogonal (cosine 0 ± dims ** -0.5). They need no model and no server.

A text's SHA-256 is four 64-bit numbers, little endian. Each seeds a SplitMix64 generator (Steele,
Lea and Flood, OOPSLA 2014). The vector's bytes are the first output of each generator, then the
second of each, and so on, little endian. A component is 2 · byte − 255, divided by the vector's
norm. Every step is an exact integer or one correctly rounded operation of IEEE 754, so the bits of
a vector are the same on every platform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from halimede.inputs.content import InputKind, serialise
from halimede.pipeline.pool import Pool
from halimede.pipeline.sharing import completed
from halimede.pipeline.waiting import Future
from halimede.providers.answers import truncate, unknown_tokens
from halimede.providers.base import Answer, Request
from halimede.providers.base import Options as BaseOptions
from halimede.providers.prompts import check_input_type
from halimede.results import ServedModel
from halimede_engine import cores
from halimede_ops.errors import InvalidDimensions

MIN_DIMS, MAX_DIMS = 384, 3072
VERSION = 1
"""Raised when the vectors change: vectors of another version have another space."""
MAX_BATCH_SIZE = 1024
"""Computed at once, in about 10 ms."""
BLOCK_TEXTS = 256
"""Texts computed together: their arrays stay in the processor's cache."""
UNLIMITED_TOKENS = 2**31 - 1


class Options(BaseOptions):
    """Hash embeddings."""

    provider: str = "hash"
    model_id: str = "hash"
    dims: int = Field(MIN_DIMS, ge=MIN_DIMS, le=MAX_DIMS)
    """Length of a vector."""


def connect(options: Options) -> list[Hash]:
    """Return the provider for these options."""
    return [Hash(options)]


class Hash:
    """Hash embeddings of texts, images and pairs. Tokens and image sizes are unknown."""

    def __init__(self, options: Options) -> None:
        self.name = f"hash:{options.model_id}"
        self._pool = Pool(cores.available(), "hash")
        self._model = ServedModel(
            name=options.model_id,
            space=hash_space(options.dims),
            precision="fp32",
            dims=options.dims,
            max_tokens=UNLIMITED_TOKENS,
            max_batch_size=MAX_BATCH_SIZE,
            provider="hash",
        )

    def describe(self, timeout_s: float, kind: InputKind | None = None) -> Future[ServedModel]:
        """Return the model, the same for every kind."""
        return completed(self._model)

    def embed(self, request: Request, timeout_s: float) -> Future[Answer]:
        """Compute the answer to a request: here if the caller waits for it, else in a thread.

        Raises:
            UnknownInputType: its input type is neither `query` nor `document`.
        """
        check_input_type(request.input_type, self._model.name)
        if request.may_block:
            return completed(self._answer(request))
        return self._pool.submit(self._answer, request)

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    def _answer(self, request: Request) -> Answer:
        contents = [serialise(content) for content in request.inputs]
        vectors = hash_embeddings(contents, self._model.dims)
        return Answer(
            truncate(vectors, request.dimensions), unknown_tokens(len(contents)), self._model
        )


def hash_embeddings(contents: Sequence[bytes], dims: int = MIN_DIMS) -> np.ndarray:
    """Hash embeddings `[contents, dims]` float32 of L2 norm 1.

    Args:
        contents: texts in UTF-8, or any other bytes.
        dims: 384 to 3072.

    Raises:
        InvalidDimensions: `dims` is out of range.
    """
    _check_dims(dims)
    digests = b"".join([hashlib.sha256(content).digest() for content in contents])
    seeds = np.frombuffer(digests, "<u8").reshape(len(contents), 4)
    vectors = np.empty((len(contents), dims), np.float32)
    for start in range(0, len(contents), BLOCK_TEXTS):
        block = slice(start, start + BLOCK_TEXTS)
        signed = _generate(seeds[block], dims).astype(np.float32) * np.float32(2) - np.float32(255)
        # Sums of odd squares: never zero, and exact in float64.
        norms = np.sqrt(np.einsum("nd,nd->n", signed, signed, dtype=np.float64))
        vectors[block] = signed / norms.astype(np.float32)[:, None]
    return vectors


def hash_space(dims: int = MIN_DIMS) -> str:
    """Space of hash embeddings of this length, 16 hex digits.

    Raises:
        InvalidDimensions: `dims` is outside 384 … 3072.
    """
    _check_dims(dims)
    return hashlib.sha256(f"halimede hash {VERSION} {dims}".encode()).hexdigest()[:16]


def _generate(seeds: np.ndarray, dims: int) -> np.ndarray:
    """Bytes `[contents, dims]` uint8 from seeds `[contents, 4]` uint64."""
    rounds = np.arange(1, -(-dims // 32) + 1, dtype=np.uint64)[:, None]
    state = seeds[:, None, :] + rounds * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state.astype("<u8").reshape(len(seeds), -1).view(np.uint8)[:, :dims]


def _check_dims(dims: int) -> None:
    if not MIN_DIMS <= dims <= MAX_DIMS:
        raise InvalidDimensions(
            f"dimensions is {dims}; hash embeddings have {MIN_DIMS} to {MAX_DIMS}."
        )
