"""Limits: the requests and tokens of a key in a window of time.

Tokens are counted once they are answered, because they are known then. A caller without any left is
refused before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from limits import (
    RateLimitItem,
    RateLimitItemPerDay,
    RateLimitItemPerMinute,
    RateLimitItemPerSecond,
)
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from halimede.gateway.errors import Problem
from halimede_ops.errors import InvalidConfig

PREFIX = "halimede"
"""Prefix of the keys in Redis."""
NAMESPACE = "gateway"
"""What is counted: the part after the prefix."""
STORAGE_TIMEOUT_S = 0.5
"""Longest wait for Redis."""
STORAGE_RETRY_S = 5.0
"""Seconds for which requests are not counted after Redis has failed."""
log = logging.getLogger("halimede.gateway.edge.limits")


class Limited(Protocol):
    """A key with its limits. None: there is no such limit."""

    @property
    def id(self) -> str:
        """Name of the key."""

    @property
    def requests_per_s(self) -> int | None:
        """Maximum requests in a second."""

    @property
    def tokens_per_min(self) -> int | None:
        """Maximum tokens in a minute."""

    @property
    def tokens_per_day(self) -> int | None:
        """Maximum tokens in a day."""


@dataclasses.dataclass
class Window:
    """What is left of a limit, and until when."""

    item: RateLimitItem
    left: int
    ends_at: float
    """Unix time at which the whole limit is there again."""

    @property
    def left_s(self) -> float:
        """Seconds until the whole limit is there again."""
        return max(0.0, self.ends_at - time.time())

    def headers(self, what: str) -> Mapping[str, str]:
        """Return the limit in OpenAI's headers for `requests` or `tokens`."""
        return {
            f"x-ratelimit-limit-{what}": str(self.item.amount),
            f"x-ratelimit-remaining-{what}": str(self.left),
            f"x-ratelimit-reset-{what}": f"{self.left_s:.3f}s",
        }

    def problem(self, what: str) -> Problem:
        """Return the refusal of a request because nothing is left."""
        period = self.item.GRANULARITY.name
        headers = {"retry-after-ms": str(math.ceil(self.left_s * 1000))}
        if period == "day":  # no program should wait for that
            headers["x-should-retry"] = "false"
        return Problem(
            429,
            f"the key's limit of {self.item.amount:,} {what} a {period} is reached. "
            f"Send again in {math.ceil(self.left_s):,} s.",
            retry_after_s=math.ceil(self.left_s),
            headers=headers,
        )


class Allowance:
    """What is left of a key's limits while one request is answered."""

    def __init__(self, limits: Limits, key_id: str, windows: Mapping[RateLimitItem, Window]):
        self._limits = limits
        self._key_id = key_id
        self._windows = windows
        self.is_over = False
        """Whether the request itself is one too many."""

    def check_requests(self) -> None:
        """Raise if the request is one too many.

        Raises:
            Problem: it is.
        """
        if self.is_over:
            raise next(self._of(REQUESTS)).problem(REQUESTS)

    def check_tokens(self) -> None:
        """Raise unless tokens are left.

        Raises:
            Problem: none are.
        """
        empty = [window for window in self._of(TOKENS) if window.left <= 0]
        if empty:
            raise max(empty, key=lambda window: window.ends_at).problem(TOKENS)

    async def charge(self, tokens: int) -> None:
        """Count tokens."""
        windows = list(self._of(TOKENS))
        if not tokens or not windows:
            return
        for window in windows:
            if not window.left_s:  # these are the first of a new window
                window.ends_at = time.time() + window.item.get_expiry()
            window.left = max(0, window.left - tokens)
        await self._limits.count([window.item for window in windows], self._key_id, tokens)

    def headers(self) -> Mapping[str, str]:
        """Return what is left, as OpenAI does. Of two limits of tokens it is the tighter."""
        found: dict[str, str] = {}
        for window in self._of(REQUESTS):
            found.update(window.headers(REQUESTS))
        tokens = min(self._of(TOKENS), key=lambda window: window.left, default=None)
        if tokens is not None:
            found.update(tokens.headers(TOKENS))
        return found

    def _of(self, what: str) -> Iterator[Window]:
        for item, window in self._windows.items():
            if (item.GRANULARITY.name == "second") == (what == REQUESTS):
                yield window


REQUESTS = "requests"
TOKENS = "tokens"


class Limits:
    """Counts what keys ask: in this process, or in Redis for all workers and gateways.

    Requests are not counted while Redis fails: that is better than to answer nobody.
    """

    def __init__(self, url: str) -> None:
        try:
            storage: Any = storage_from_string(f"async+{url}", **_options(url))
        except (ConfigurationError, ValueError):
            raise InvalidConfig(
                "gateway.limits_storage is not supported; give memory:// or redis://host:port, "
                "and install halimede[redis] for that."
            ) from None
        self._storage = storage
        self._limiter = FixedWindowRateLimiter(storage)
        self._failed_s = -STORAGE_RETRY_S

    async def allowance(self, key: Limited, requests: int = 1) -> Allowance | None:
        """Count requests of a key, and return what is left. None: it has no limits, or what is
        left is not known.
        """
        items = list(_items(key))
        if not items or self._is_down:
            return None
        try:
            is_over = False
            if requests and key.requests_per_s:
                is_over = not await self._limiter.hit(items[0], key.id, cost=requests)
            stats = await asyncio.gather(
                *(self._limiter.get_window_stats(item, key.id) for item in items)
            )
        except (StorageError, OSError) as error:
            self._fail(error)
            return None
        windows = {
            item: Window(item, int(remaining), ends_at)
            for item, (ends_at, remaining) in zip(items, stats, strict=True)
        }
        allowance = Allowance(self, key.id, windows)
        allowance.is_over = is_over
        return allowance

    async def count(self, items: list[RateLimitItem], key_id: str, amount: int) -> None:
        """Count an amount in windows of a key."""
        if self._is_down:
            return
        try:
            await asyncio.gather(*(self._limiter.hit(i, key_id, cost=amount) for i in items))
        except (StorageError, OSError) as error:
            self._fail(error)

    async def close(self) -> None:
        """Close the connection."""
        client = getattr(getattr(self._storage, "bridge", None), "storage", None)
        if client is not None:
            await client.aclose()

    @property
    def _is_down(self) -> bool:
        return time.monotonic() - self._failed_s < STORAGE_RETRY_S

    def _fail(self, error: Exception) -> None:
        self._failed_s = time.monotonic()
        log.warning("gateway.limits_storage fails (%s); nothing is counted.", type(error).__name__)


def _items(key: Limited) -> Iterator[RateLimitItem]:
    if key.requests_per_s:
        yield RateLimitItemPerSecond(key.requests_per_s, namespace=NAMESPACE)
    if key.tokens_per_min:
        yield RateLimitItemPerMinute(key.tokens_per_min, namespace=NAMESPACE)
    if key.tokens_per_day:
        yield RateLimitItemPerDay(key.tokens_per_day, namespace=NAMESPACE)


def _options(url: str) -> dict[str, Any]:
    if url.startswith("memory:"):
        return {}
    return {
        "wrap_exceptions": True,
        "implementation": "redispy",
        "key_prefix": PREFIX,
        "socket_timeout": STORAGE_TIMEOUT_S,
        "socket_connect_timeout": STORAGE_TIMEOUT_S,
    }
