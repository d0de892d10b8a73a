"""What a server's metrics port tells."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable

import httpx

from halimede_tools.serve.wheel import Server

TIMEOUT_S = 60.0
SAMPLE = re.compile(r"^(\w+)(?:{(.*)})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


def figures(
    server: Server, until: Callable[[Counter[str]], bool] = lambda found: True, **labels: str
) -> Counter[str]:
    """Each metric, summed over its series with these labels, as soon as `until` holds of them:
    backends publish once a second.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        address = f"http://127.0.0.1:{server.options.metrics_port}/metrics"
        told = httpx.get(address, timeout=TIMEOUT_S).text
        found: Counter[str] = Counter()
        for name, series, value in SAMPLE.findall(told):
            if labels.items() <= dict(LABEL.findall(series)).items():
                found[name] += float(value)
        if until(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
