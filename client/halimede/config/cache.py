"""The `cache` key of a configuration."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from halimede.cache import Cache, Disk, Memory, Redis, Tier
from halimede.cache.disk import MIN_BYTES
from halimede_ops.errors import InvalidConfig

MIB = 2**20


class DiskCache(BaseModel):
    """Cache on disk."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    path: Path
    """Folder of the cache. Several processes can share it. `~` is the user's home."""
    max_mb: int = Field(1024, ge=MIN_BYTES // MIB)
    """Largest size of the folder in MiB; the oldest vectors are evicted first."""
    ttl_s: PositiveFloat | None = Field(None, alias="ttl")
    """Seconds that a vector stays on disk. Default: until it is evicted."""

    @field_validator("path")
    @classmethod
    def _with_home(cls, path: Path) -> Path:
        if path == Path() or "\0" in str(path):
            raise ValueError("is no path of a folder")
        try:
            return path.expanduser()
        except RuntimeError:
            raise ValueError("has ~, but the user has no home; give a whole path") from None


class RedisCache(BaseModel):
    """Cache in Redis: one entry per vector, which a hit renews."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    url: str = "redis://127.0.0.1:6379/0"
    """Server: `redis://host:port/database`, `rediss://…` for TLS, or `unix://…`."""
    url_env: str | None = None
    """Environment variable that holds the url, for a url with a password."""
    prefix: str = "halimede"
    """First part of every key in Redis."""
    timeout_s: PositiveFloat = Field(0.5, alias="timeout")
    """Longest wait for one request, in seconds. After that Redis is skipped until it answers."""
    hot_ttl_s: PositiveFloat = Field(3600, alias="hot_ttl")
    """Seconds after its last use until which an entry counts as hot in the statistics."""
    warm_ttl_s: PositiveFloat = Field(24 * 3600, alias="warm_ttl")
    """Seconds after its last use until which an entry counts as warm, and then as cold."""
    cold_ttl_s: PositiveFloat = Field(7 * 24 * 3600, alias="cold_ttl")
    """Seconds after its last use until an entry expires. A longer `hot_ttl` or `warm_ttl` holds."""

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
    """Cache of vectors, in up to three tiers: memory, disk and Redis."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    memory_mb: PositiveInt | None = 256
    """Largest size of the cache in this process, in MiB. `null`: no cache in memory."""
    disk: DiskCache | None = None
    """Cache on disk. Without this key there is none."""
    redis: RedisCache | None = None
    """Cache in Redis. Without this key there is none."""
    model_check_s: float = Field(1.0, ge=0, alias="model_check")
    """Seconds after which the provider is asked again which model it serves, before a cached vector
    of that model is returned."""

    def open(self) -> Cache:
        """Return a cache with these tiers; each connects on first use.

        Raises:
            InvalidConfig: the environment has no `url_env`.
        """
        tiers: list[Tier] = []
        if self.memory_mb is not None:
            tiers.append(Memory(self.memory_mb * MIB))
        if self.disk is not None:
            tiers.append(Disk(self.disk.path, self.disk.max_mb * MIB, self.disk.ttl_s))
        if self.redis is not None:
            tiers.append(self.redis.open())
        return Cache(tiers)
