"""Cached vectors in tiers: process memory, disk, Redis.

    cache = Cache([Memory(256 * MIB), Disk(folder, 4 * GIB, WEEK_S), *temperatures(url)])
    wanted = keys(texts, space=…, precision=…, input_type=…, dims=384)
    entries, hits = await cache.get_or_compute(wanted, compute, Expect(dims=384))

What every caller must hold:

- All coroutines of a cache run on one event loop; making a cache, `stats()` and `keys()` need none.
- One call, one space: `compute` answers in the space that `keys` was given, or raises. So a cache
  wraps one provider and a fallback chain wraps caches, never the other way round.
- Vectors are kept as float32, before quantisation: the output type is not in the key, and one
  entry serves every output type.
- A call of a few thousand keys is answered at memory speed; split longer ones.

Neither keys nor values hold a text.
"""

from halimede.cache.cache import Cache
from halimede.cache.disk import Disk
from halimede.cache.entries import Entries, Expect
from halimede.cache.key import keys
from halimede.cache.memory import Memory
from halimede.cache.redis import Redis, temperatures
from halimede.cache.tier import Tier

__all__ = [
    "Cache",
    "Disk",
    "Entries",
    "Expect",
    "Memory",
    "Redis",
    "Tier",
    "keys",
    "temperatures",
]
