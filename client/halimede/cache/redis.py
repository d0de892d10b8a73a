"""Values in Redis, or in any server that speaks its protocol."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from halimede.cache.tier import Item
from halimede_ops.errors import InvalidInput, MissingExtra

HOT_S, WARM_S, COLD_S = 3600.0, 24 * 3600.0, 7 * 24 * 3600.0
CONNECTIONS = 8
SCANNED = 1000


class Redis:
    """Values under `prefix` + name on one server; each leaves `ttl_s` after it was written."""

    def __init__(
        self,
        url: str,
        ttl_s: float | None = COLD_S,
        *,
        name: str = "redis",
        prefix: str = "halimede",
        timeout_s: float = 0.5,
    ) -> None:
        """Name the server; the first use connects.

        Args:
            url: `redis://[[user]:password@]host:port/database`, `rediss://…` or `unix://…`.
            ttl_s: None keeps a value until Redis itself evicts it.
            name: also part of the keys: tiers of different names on one server do not meet.
            prefix: first part of the keys, which lets one server hold what is not ours.
            timeout_s: longest wait for one request, connecting included.

        Raises:
            MissingExtra: the package `redis` is not installed.
            InvalidInput: a url of another form; it is not repeated, as it may hold a password.
        """
        self.name = name
        self.timeout_s = timeout_s
        self._ttl_ms = None if ttl_s is None else max(1, round(ttl_s * 1000))
        self._prefix = f"{prefix}:{name}:".encode()
        self._client = _client(url, timeout_s)

    @property
    def size_bytes(self) -> None:
        """Known to the server alone."""
        return

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Each key's value, or None, with one MGET."""
        return await self._client.mget([self._prefix + key for key in keys])

    async def put(self, items: Sequence[Item]) -> None:
        """Hold the values for `ttl_s`, in one pipeline."""
        pipeline = self._client.pipeline(transaction=False)
        for key, value in items:
            pipeline.set(self._prefix + key, value, px=self._ttl_ms)
        await pipeline.execute()

    async def clear(self) -> None:
        """Forget every value under this tier's prefix."""
        pattern = re.sub(rb"([*?\[\]\\^-])", rb"\\\1", self._prefix) + b"*"
        cursor = None
        while cursor != 0:
            cursor, found = await self._client.scan(cursor or 0, pattern, SCANNED)
            if found:
                await self._client.unlink(*found)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()


def temperatures(
    url: str,
    *,
    hot_s: float = HOT_S,
    warm_s: float = WARM_S,
    cold_s: float = COLD_S,
    **options: Any,
) -> list[Redis]:
    """Tiers `hot`, `warm` and `cold` of one server; `options` as for `Redis`."""
    ages_s = {"hot": hot_s, "warm": warm_s, "cold": cold_s}
    return [Redis(url, ttl_s, name=name, **options) for name, ttl_s in ages_s.items()]


def _client(url: str, timeout_s: float) -> Any:
    try:
        from redis import asyncio as redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise MissingExtra(
            "a Redis tier needs the package redis: pip install 'halimede[redis]'."
        ) from error
    try:
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # Once more at once: a connection that idled may be dead while the server is not.
            retry=Retry(NoBackoff(), 1),
        )
    except (ValueError, TypeError):
        raise InvalidInput(
            "the url of a Redis tier is not redis://host:port/database, rediss://… or unix://…."
        ) from None
    return redis.Redis(connection_pool=pool)
