"""Ports that nobody has, for servers of one machine that are started soon."""

from __future__ import annotations

import itertools
import random
import socket

PORTS = range(10_000, 32_000)
"""Below those that Linux gives to connections, so that none is taken before its server is up."""


def free_ports(count: int) -> list[int]:
    """So many different ports of 127.0.0.1."""
    # The system's randomness: hypothesis seeds Python's, for every process alike.
    tried = random.SystemRandom().sample(PORTS, 10 * count)
    return list(itertools.islice(filter(_is_free, tried), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
