"""A connection to one Triton server, over gRPC or HTTP.

Requests and answers are the messages of Triton's gRPC service, over HTTP too.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, FilePath, model_validator

from halimede.pipeline.waiting import Future
from halimede.providers.proxies import is_loopback, proxy_for
from halimede_ops import errors

MESSAGES: tuple[tuple[str, type[errors.HalimedeError], str], ...] = (
    (
        "maximum queue size",
        errors.ServerOverloaded,
        "the server at {} has a full queue. Back off and send again.",
    ),
    (
        "restricted, expecting header",
        errors.AccessDenied,
        "the server at {} needs its control key for this, and was given none or a wrong one. Pass "
        "the key's file as --control-key-file.",
    ),
    (
        "not (?:at )?ready|is unloading|being loaded|has no available versions",
        errors.ServerUnreachable,
        "the server at {} is loading or unloading the model. Send again.",
    ),
    (  # of a model whose backend process was killed
        "is not healthy|stub process",
        errors.ServerUnreachable,
        "a process of the server at {} has died. Start the server again, if `serve` or a container "
        "does not.",
    ),
    (  # there is no room to hand a request to a backend
        "shared memory",
        errors.OutOfMemory,
        "the server at {} has too little shared memory. Give it a larger /dev/shm, or send less.",
    ),
    (
        "out of memory|bad_alloc|failed to allocate",
        errors.OutOfMemory,
        "the server at {} has no memory left.",
    ),
)
"""Pattern of a message of Triton's, whatever its code → error class → message, with the address."""
PLACE = re.compile(r"(text|image|input) (\d+) (.*)", re.DOTALL)
"""Subject, index and rest of a message about one input."""
GRPC_PROXIES = ("grpc", "https", "http")
"""The variables that gRPC reads, with or without TLS."""
DEFAULT_PORTS = {"grpc": 8001, "grpcs": 443, "http": 80, "https": 443}


class Connection(Protocol):
    """A connection to one server. The first request opens it."""

    address: Address

    def start(
        self,
        method: str,
        message: Any,
        timeout_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        may_block: bool = False,
    ) -> Future[Any]:
        """Start a request. Return the future of its answer.

        Args:
            method: name of a method of Triton's gRPC service, such as ModelInfer.
            message: its request.
            timeout_s: maximum time.
            headers: further headers.
            may_block: whether the caller's thread may wait for the answer.

        Raises:
            HalimedeError: the request failed. As all errors, raised here or by the future.
        """
        ...

    def close(self) -> None:
        """End the requests under way and close the connection. A second call does nothing."""
        ...


class Tls(BaseModel):
    """Certificates for `grpcs://` and `https://`, each a PEM file."""

    model_config = ConfigDict(extra="forbid")

    ca_file: FilePath | None = None
    """Certificates of trusted authorities. None trusts those of this machine."""
    cert_file: FilePath | None = None
    """Certificate of this client, for servers that request one."""
    key_file: FilePath | None = None
    """Key of the certificate."""

    @model_validator(mode="after")
    def _is_whole(self) -> Tls:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together; give both")
        return self

    def for_grpc(self) -> list[bytes | None]:
        """Return the authorities' certificates, the client's key, and its certificate."""
        files = (self.ca_file, self.key_file, self.cert_file)
        return [None if path is None else path.read_bytes() for path in files]

    def for_http(self) -> ssl.SSLContext:
        """Return the context for an HTTP client."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


class Address(NamedTuple):
    """Where a server is."""

    scheme: str
    """grpc, grpcs, http or https."""
    host: str
    """`host:port`, with brackets around an IPv6 address."""
    prefix: str
    """Path in front of every request, for HTTP behind a gateway. Empty: there is none."""

    def __str__(self) -> str:
        return self.host + self.prefix

    @property
    def is_secure(self) -> bool:
        """Whether the connection uses TLS."""
        return self.scheme.endswith("s")

    @property
    def is_grpc(self) -> bool:
        """Whether the protocol is gRPC."""
        return self.scheme.startswith("grpc")

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine, which no proxy is asked for."""
        return is_loopback(str(urlsplit(f"//{self.host}").hostname))

    @property
    def url(self) -> str:
        """URL for an HTTP client."""
        scheme = self.scheme.replace("grpc", "http")
        return f"{scheme}://{self.host}{self.prefix}"

    @property
    def proxy(self) -> str | None:
        """`host:port` of the proxy that requests go through. None: they go to the server."""
        return proxy_for(self.url, GRPC_PROXIES if self.is_grpc else ())

    def unreachable(self) -> errors.ServerUnreachable:
        """Return the error for a server that does not answer."""
        proxy = self.proxy
        way = f" through the proxy {proxy} of the environment" if proxy else ""
        advice = (
            "Check the proxy, or add the host to no_proxy"
            if proxy
            else "Start one with `make serve`"
        )
        return errors.ServerUnreachable(
            f"no Triton answers at {self}{way}. {advice}, or give its address as url."
        )

    def not_triton(self, reason: str) -> errors.HalimedeError:
        """Return the error for a server that is something else."""
        return errors.HalimedeError(
            f"{self} is not a Triton server's {'gRPC' if self.is_grpc else 'HTTP'} port: {reason}. "
            "Check the url; Triton's ports are 8000 for http://, 8001 for grpc:// and 8002 for "
            "metrics."
        )


def parse(url: str, tls: Tls | None = None) -> Address:
    """Parse the URL of a server.

    Raises:
        InvalidInput: it is invalid, or is without TLS although `tls` has certificates.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "grpc", url
    try:
        parts = urlsplit(f"//{rest}")
        port = DEFAULT_PORTS.get(scheme, 0) if parts.port is None else parts.port
        is_valid = bool(port and parts.hostname and "@" not in parts.netloc)
        is_valid &= scheme in DEFAULT_PORTS
    except ValueError:  # a port that is none, brackets that are not closed
        is_valid = False
    if not is_valid or parts.query or parts.fragment or re.search(r"\s", url):
        given = "has a user or password" if "@" in url else f"is {url!r}"
        raise errors.InvalidInput(
            f"url {given}; give host:port, grpc://host:port or http://host:port, with TLS "
            "grpcs:// or https://. A port is 1 to 65535."
        )
    prefix = parts.path.rstrip("/")
    if prefix and scheme.startswith("grpc"):
        raise errors.InvalidInput(
            f"url {url!r} has a path, which gRPC does not have; give host:port, or http:// for a "
            "server behind a path."
        )
    if tls not in (None, Tls()) and not scheme.endswith("s"):
        raise errors.InvalidInput(
            f"certificates are given, but {url} is without TLS; write {scheme}s://{rest}."
        )
    name = f"[{parts.hostname}]" if ":" in str(parts.hostname) else str(parts.hostname)
    return Address(scheme, f"{name}:{port}", prefix)


def connect(url: str, tls: Tls) -> Connection:
    """Return a connection to the server at a URL. The first request opens it.

    Raises:
        InvalidInput: the URL is invalid, or is without TLS although certificates are given.
    """
    address = parse(url, tls)
    if address.is_grpc:
        from halimede.providers.triton.grpc_connection import GrpcConnection

        return GrpcConnection(address, tls)
    from halimede.providers.triton.http_connection import HttpConnection

    return HttpConnection(address, tls)


def explained(message: str, address: Address) -> errors.HalimedeError | None:
    """Return the error that Triton's message stands for. None if it is none that we know."""
    message = re.sub(r"^in ensemble '[^']*', ", "", message)
    for pattern, error_class, explanation in MESSAGES:
        if re.search(pattern, message, re.IGNORECASE):
            return error_class(explanation.format(address))
    name, _, rest = message.partition(": ")
    ours = getattr(errors, name, None)
    if not isinstance(ours, type) or not issubclass(ours, errors.HalimedeError):
        return None
    # The text is all that Triton passes on, so the index is read from it.
    place = PLACE.fullmatch(rest)
    if place is None:
        return ours(rest)
    return ours(place[3], subject=place[1], index=int(place[2]))
