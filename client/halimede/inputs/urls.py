"""What is at a url, fetched as one fetches what a stranger names: little, soon, and from outside.

The server never fetches. Every address that a host's name stands for must be public, and the
connection goes to an address that was checked, not to the name again; each redirect is checked
like a url of its own. Proxies of the environment are not used: they would resolve the name anew.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat

from halimede.providers.base import optional
from halimede_ops.errors import FetchFailed, ImageTooLarge, InvalidImage, UrlRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

AZURE = ipaddress.IPv4Address("168.63.129.16")
"""Of the public range, but the host of every virtual machine on Azure answers there."""
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv6 addresses that stand for the IPv4 address in their last 32 bits (RFC 6052)."""
UNTYPED = ("", "application/octet-stream", "binary/octet-stream")
"""Content types of servers that do not know better."""
# Compressed content could grow a thousandfold; what is counted is what arrives.
HEADERS = {"User-Agent": "halimede", "Accept": "image/*", "Accept-Encoding": "identity"}


class UrlOptions(BaseModel):
    """Which urls of images are fetched, and how long that may take."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    timeout_s: PositiveFloat = Field(20.0, alias="timeout")
    """Longest wait for one image, redirects included, in seconds."""
    redirects: NonNegativeInt = 5
    """Most redirects that are followed."""
    allow_http: bool = False
    """Whether http is fetched too, and not https alone."""
    allow_private: bool | tuple[str, ...] = False
    """Whether addresses that are not public are fetched from, such as this machine and those of its
    network: true for all, or the hosts that may have one."""


class Fetch:
    """Fetches images."""

    def __init__(self, options: UrlOptions) -> None:
        self.options = options

    async def __call__(self, url: str, most_bytes: int) -> bytes:
        """What is at the url.

        Raises:
            UrlRefused: it is not https, or it or a redirect leads to an address that is not public.
            FetchFailed: nothing was there, or it did not all come in time.
            InvalidImage: it is no image, by its content type.
            ImageTooLarge: it has more than `most_bytes`.
            MissingExtra: httpx is not installed.
        """
        httpx: Any = optional("httpx", "images")
        try:
            return await asyncio.wait_for(
                self._follow(httpx, url, most_bytes), self.options.timeout_s
            )
        except TimeoutError:
            raise FetchFailed(
                f"the url gave no whole image within {self.options.timeout_s:g} s. Try again, or "
                "raise urls.timeout."
            ) from None
        except httpx.InvalidURL:
            raise UrlRefused("the url is not one. Give https://host/path.") from None
        except httpx.HTTPError as error:
            raise FetchFailed(f"the url could not be fetched ({type(error).__name__}).") from None

    async def _follow(self, httpx: Any, url: str, most_bytes: int) -> bytes:
        """What is at the end of the url's redirects."""
        at = httpx.URL(url)
        for _ in range(self.options.redirects + 1):
            self._check_form(at)
            addresses = await self._addresses(at)
            # A client each: no cookie and no connection is shared between hosts.
            async with httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=None) as client:
                response = await _respond(httpx, client, at, addresses)
                if not response.has_redirect_location:
                    return await _body(response, most_bytes)
                at = at.join(response.headers["Location"])
        raise FetchFailed(f"the url redirects more than {self.options.redirects} times.")

    def _check_form(self, url: Any) -> None:
        schemes = ("https", "http") if self.options.allow_http else ("https",)
        if url.scheme not in schemes or not url.host:
            raise UrlRefused(f"only {' and '.join(schemes)} urls are fetched (urls.allow_http).")
        if url.port is not None and not 0 < url.port < 65536:
            raise UrlRefused("the url's port is none.")
        if url.userinfo:
            raise UrlRefused("the url has a user or a password. Fetch it yourself, give the bytes.")

    async def _addresses(self, url: Any) -> list[str]:
        """The addresses of the url's host, all of them allowed."""
        loop = asyncio.get_running_loop()
        host = url.raw_host.decode("ascii")
        try:
            found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise FetchFailed("the url's host has no address.") from None
        addresses = [str(socket_address[0]) for *_, socket_address in found]
        if not self._may_be_private(host) and not all(map(is_public, addresses)):
            raise UrlRefused(
                "the url leads to an address that is not public. Fetch it yourself and give the "
                "bytes, or name its host in urls.allow_private."
            )
        return addresses

    def _may_be_private(self, host: str) -> bool:
        allowed = self.options.allow_private
        return allowed if isinstance(allowed, bool) else host in allowed

    @functools.cached_property
    def _tls(self) -> Any:
        """The certificates to trust: read once, it takes longer than a fetch."""
        return optional("httpx", "images").create_ssl_context()


def is_public(address: str) -> bool:
    """Whether an address, and the IPv4 address that it stands for, is of the public internet."""
    try:
        return all(_is_public(one) for one in _meant(ipaddress.ip_address(address)))
    except ValueError:
        return False


def _is_public(address: Address) -> bool:
    return address.is_global and not (
        address == AZURE
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or (address.version == 6 and address.is_site_local)
    )


def _meant(address: Address) -> list[Address]:
    """The addresses that packets to this one may reach: NAT64, 6to4, Teredo carry one of IPv4."""
    if address.version == 4:
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in NAT64:
        return [ipaddress.IPv4Address(address.packed[-4:])]
    inside = [address.sixtofour, *(address.teredo or ())]
    return [address, *(one for one in inside if one is not None)]


async def _respond(httpx: Any, client: Any, url: Any, addresses: list[str]) -> Any:
    """The response of the first address that answers, its body still to be read."""
    for address in addresses:
        request = client.build_request(
            "GET",
            url.copy_with(host=address),
            headers={**HEADERS, "Host": url.netloc.decode("ascii")},
            # The certificate must be that of the name, not of the address.
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        try:
            return await client.send(request, stream=True)
        except httpx.ConnectError:
            if address == addresses[-1]:
                raise
    raise FetchFailed("the url's host has no address.")


async def _body(response: Any, most_bytes: int) -> bytes:
    """The body of a response that is an image of at most so many bytes."""
    if response.status_code != 200:
        raise FetchFailed(f"the url answers {response.status_code}.")
    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type not in UNTYPED and not content_type.startswith("image/"):
        raise InvalidImage("the url gives no image, by its content type.")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchFailed("the url gives compressed content, although it was asked not to.")
    body = bytearray()
    async for block in response.aiter_raw():
        body += block
        if len(body) > most_bytes:
            raise ImageTooLarge(f"the url gives more than the {most_bytes:,} bytes that are taken.")
    return bytes(body)
