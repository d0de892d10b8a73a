"""The cache's part of a configuration, and the cache that it describes."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from halimede.cache import Cache, Disk, Memory, Redis, Tier
from halimede_ops.errors import InvalidConfig

MIB = 2**20


class DiskCache(BaseModel):
    """Cache on disk."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    path: Path
    """Folder of the cache."""
    max_mb: PositiveInt = 1024
    ttl_s: PositiveFloat | None = Field(None, alias="ttl")


class RedisCache(BaseModel):
    """Cache in Redis: one entry a vector, which a hit renews."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    url: str = "redis://127.0.0.1:6379/0"
    url_env: str | None = None
    """Environment variable that holds the url, for one with a password."""
    prefix: str = "halimede"
    timeout_s: PositiveFloat = Field(0.5, alias="timeout")
    hot_ttl_s: PositiveFloat = Field(3600, alias="hot_ttl")
    warm_ttl_s: PositiveFloat = Field(24 * 3600, alias="warm_ttl")
    cold_ttl_s: PositiveFloat = Field(7 * 24 * 3600, alias="cold_ttl")

    def open(self) -> Redis:
        """Return the tier; it connects on first use.

        Raises:
            InvalidConfig: the environment has no `url_env`.
        """
        url = self.url
        if self.url_env is not None:
            url = os.environ.get(self.url_env, "")
            if not url:
                raise InvalidConfig(f"the environment has no {self.url_env} (cache.redis.url_env).")
        return Redis(
            url,
            # An entry lives for the longest of the three, whatever their order.
            max(self.hot_ttl_s, self.warm_ttl_s, self.cold_ttl_s),
            hot_ttl_s=self.hot_ttl_s,
            warm_ttl_s=self.warm_ttl_s,
            prefix=self.prefix,
            timeout_s=self.timeout_s,
        )


class CacheConfig(BaseModel):
    """Cache tiers, from the nearest to the farthest."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    memory_mb: PositiveInt | None = 256
    """Largest size in this process; null: no such tier."""
    disk: DiskCache | None = None
    redis: RedisCache | None = None
    model_check_s: float = Field(1.0, ge=0, alias="model_check")
    """Seconds after which a model is described anew before something cached of it is given."""

    def open(self) -> Cache:
        """The cache of these tiers; each connects on first use.

        Raises:
            InvalidConfig: the environment has no `url_env`.
        """
        tiers: list[Tier] = []
        if self.memory_mb is not None:
            tiers.append(Memory(self.memory_mb * MIB))
        if self.disk is not None:
            folder = self.disk.path.expanduser()
            tiers.append(Disk(folder, self.disk.max_mb * MIB, self.disk.ttl_s))
        if self.redis is not None:
            tiers.append(self.redis.open())
        return Cache(tiers)
