"""Cached vectors in tiers: process memory, disk, Redis.

    cache = Cache([Memory(256 * MIB), Disk(folder, 4 * GIB, WEEK_S), Redis(url)])
    wanted = keys(texts, space=…, precision=…, input_type=…, dims=384)
    entries, hits = drive(cache.get_or_compute(wanted, compute, Expect(dims=384)))

Rules for callers:

- `get_or_compute` is a flow (`halimede.pipeline.waiting`), and so is what `compute` returns. All
  other methods block.
- One call has one space: `compute` answers in the space given to `keys`, or raises. So a cache
  wraps one provider, and a fallback chain wraps caches, not the other way round.
- Vectors are stored as float32, before quantisation: the output type is not part of the key, and
  one entry serves every output type.

Neither keys nor values contain a text.
"""

from halimede.cache.cache import Cache
from halimede.cache.disk import Disk
from halimede.cache.entries import Entries, Expect
from halimede.cache.key import keys
from halimede.cache.memory import Memory
from halimede.cache.redis import Redis
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
]
