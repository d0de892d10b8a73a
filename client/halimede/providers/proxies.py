"""Proxies of the environment: which one a request would use. This machine is never proxied."""

from __future__ import annotations

import ipaddress
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def is_local(url: str) -> bool:
    """Whether a URL leads to this machine."""
    return is_loopback(urlsplit(url).hostname or "")


def proxy_for(url: str, kinds: Sequence[str] = ()) -> str | None:
    """Return `host:port` of the proxy that a request to a URL uses. None: it uses none.

    `kinds` are the variables to look at, without `_proxy`. Default: that of the URL, and `all`.
    """
    parts = urlsplit(url)
    if is_local(url) or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxies = urllib.request.getproxies()
    for kind in kinds or (parts.scheme, "all"):
        if proxy := proxies.get(kind):
            named = urlsplit(proxy if "://" in proxy else f"//{proxy}")
            return named.netloc.rpartition("@")[2]
    return None
