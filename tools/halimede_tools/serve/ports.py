"""Free ports for servers on this machine."""

from __future__ import annotations

import itertools
import random
import socket

PORTS = range(10_000, 32_000)
"""Below the ephemeral ports of Linux: no connection takes one before its server listens."""


def free_ports(count: int) -> list[int]:
    """`count` different free ports of 127.0.0.1."""
    # SystemRandom: hypothesis seeds `random` alike in every process.
    candidates = random.SystemRandom().sample(PORTS, 10 * count)
    return list(itertools.islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
