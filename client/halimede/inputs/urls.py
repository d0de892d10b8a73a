"""Fetches an untrusted image URL: bounded size and time, public addresses only.

The client fetches; the server never does. Every address of a host must be public. The connection
goes to a checked address, so that a second DNS answer cannot redirect it. Each redirect is checked
like a new URL. Proxies of the environment are not used, because they would resolve the host again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import importlib
import ipaddress
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat

from halimede_ops.errors import FetchFailed, ImageTooLarge, InvalidImage, UrlRefused

T = TypeVar("T")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

AZURE = ipaddress.IPv4Address("168.63.129.16")
"""A public address where the host of every virtual machine on Azure answers."""
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv6 addresses that stand for the IPv4 address in their last 32 bits (RFC 6052)."""
UNTYPED = ("", "application/octet-stream", "binary/octet-stream")
"""Content types of servers that do not tell the real one."""
# Bytes are counted as they arrive, and compressed content could expand a thousandfold.
HEADERS = {"User-Agent": "halimede", "Accept": "image/*", "Accept-Encoding": "identity"}


class UrlOptions(BaseModel):
    """Which image URLs are fetched, and how long that may take."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    timeout_s: PositiveFloat = Field(20.0, alias="timeout")
    """Longest wait for one image, redirects included, in seconds."""
    redirects: NonNegativeInt = 5
    """Maximum number of redirects to follow."""
    allow_http: bool = False
    """Fetch http as well as https."""
    allow_private: bool | tuple[str, ...] = False
    """Fetch from addresses that are not public, such as this machine and its network: true for all
    hosts, or a list of hosts."""


class Fetch:
    """Fetches images from URLs."""

    def __init__(self, options: UrlOptions) -> None:
        self.options = options

    def __call__(self, url: str, max_bytes: int) -> bytes:
        """Return the content of a URL. Blocks, at most `timeout_s`.

        Raises:
            UrlRefused: it is not https, or it or a redirect leads to an address that is not public.
            FetchFailed: the server did not answer, or did not send everything in time.
            InvalidImage: the content type is not an image's.
            ImageTooLarge: the content has more than `max_bytes`.
        """
        # A loop of its own, in a thread without one: asyncio ends a fetch in time, whatever the
        # server does. Closed without waiting for a thread that still asks for an address.
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(
                asyncio.wait_for(self._follow(url, max_bytes), self.options.timeout_s)
            )
        except TimeoutError:
            raise FetchFailed(
                f"the URL did not send its whole image within {self.options.timeout_s:g} s. Try "
                "again, or raise urls.timeout."
            ) from None
        except _httpx().InvalidURL:
            raise UrlRefused("the URL is invalid. Give https://host/path.") from None
        except _httpx().HTTPError as error:
            raise FetchFailed(f"the URL could not be fetched ({type(error).__name__}).") from None
        finally:
            loop.close()

    async def _follow(self, url: str, max_bytes: int) -> bytes:
        """Return the content at the end of the redirects."""
        current = _httpx().URL(url)
        for _ in range(self.options.redirects + 1):
            self._check_form(current)
            addresses = await self._addresses(current)
            # One client per redirect: hosts share no cookie and no connection.
            # The time limit is that of the whole, not of a step.
            client_class = _httpx().AsyncClient
            async with client_class(verify=self._tls, trust_env=False, timeout=None) as client:
                response = await _respond(client, current, addresses)
                if not response.has_redirect_location:
                    return await _body(response, max_bytes)
                current = current.join(response.headers["Location"])
        raise FetchFailed(f"the URL redirects more than {self.options.redirects} times.")

    def _check_form(self, url: Any) -> None:
        schemes = ("https", "http") if self.options.allow_http else ("https",)
        if url.scheme not in schemes or not url.host:
            raise UrlRefused(f"only {' and '.join(schemes)} URLs are fetched (urls.allow_http).")
        if url.port is not None and not 0 < url.port < 65536:
            raise UrlRefused("the URL's port is invalid.")
        if url.userinfo:
            raise UrlRefused("the URL has a user or password. Fetch it yourself; give the bytes.")

    async def _addresses(self, url: Any) -> list[str]:
        """Resolve the URL's host. Every address is allowed, or UrlRefused is raised."""
        host = url.raw_host.decode("ascii")
        try:
            # Not the loop's executor: the end of the program waits for its threads.
            resolved = await asyncio.wrap_future(
                _in_thread(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
            )
        except (OSError, UnicodeError):
            raise FetchFailed("the URL's host has no address.") from None
        addresses = [str(socket_address[0]) for *_, socket_address in resolved]
        if not self._may_be_private(host) and not all(map(is_public, addresses)):
            raise UrlRefused(
                "the URL leads to an address that is not public. Fetch it yourself and give the "
                "bytes, or name its host in urls.allow_private."
            )
        return addresses

    def _may_be_private(self, host: str) -> bool:
        allowed = self.options.allow_private
        return allowed if isinstance(allowed, bool) else host in allowed

    @functools.cached_property
    def _tls(self) -> Any:
        """Trusted certificates, loaded once: loading takes longer than a fetch."""
        return _httpx().create_ssl_context()


def _in_thread(call: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Return the future of a call in a daemon thread."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    try:
        threading.Thread(target=run, name="halimede-fetch", daemon=True).start()
    except RuntimeError:  # the interpreter is shutting down
        run()
    return future


def _httpx() -> Any:
    """httpx, imported on first use: it takes as long as all of halimede."""
    return importlib.import_module("httpx")


def is_public(address: str) -> bool:
    """Whether an address, and any IPv4 address embedded in it, is public."""
    try:
        return all(map(_is_global, _reachable(ipaddress.ip_address(address))))
    except ValueError:
        return False


def _is_global(address: Address) -> bool:
    return address.is_global and not (
        address == AZURE
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or (address.version == 6 and address.is_site_local)
    )


def _reachable(address: Address) -> list[Address]:
    """Addresses that packets to this one may reach: NAT64, 6to4 and Teredo embed IPv4 addresses."""
    if address.version == 4:
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in NAT64:
        return [ipaddress.IPv4Address(address.packed[-4:])]
    embedded = [address.sixtofour, *(address.teredo or ())]
    return [address, *(ipv4 for ipv4 in embedded if ipv4 is not None)]


async def _respond(client: Any, url: Any, addresses: list[str]) -> Any:
    """Send the request to the addresses in turn until one answers. The body is not read yet."""
    for address in addresses:
        request = client.build_request(
            "GET",
            url.copy_with(host=address),
            headers={**HEADERS, "Host": url.netloc.decode("ascii")},
            # The certificate must match the host, not the address.
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        try:
            return await client.send(request, stream=True)
        except _httpx().ConnectError:
            if address == addresses[-1]:
                raise
    raise FetchFailed("the URL's host has no address.")


async def _body(response: Any, max_bytes: int) -> bytes:
    """Read the body of a response, an image of at most `max_bytes`."""
    if response.status_code != 200:
        raise FetchFailed(f"the URL answers {response.status_code}.")
    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type not in UNTYPED and not content_type.startswith("image/"):
        raise InvalidImage("the URL does not give an image, by its content type.")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchFailed("the URL gives compressed content, which was not asked for.")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise ImageTooLarge(f"the URL gives more than the {max_bytes:,} bytes allowed.")
    return bytes(body)
