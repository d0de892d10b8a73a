"""A connection to one Triton server, over gRPC or HTTP, that raises halimede's errors."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, FilePath, model_validator
from tritonclient.utils import InferenceServerException

from halimede.providers.http_errors import is_connection_error, timed_out
from halimede_ops import errors

CODES = {
    "INVALID_ARGUMENT": errors.InvalidInput,
    "400": errors.InvalidInput,
    "NOT_FOUND": errors.ModelNotFound,
    "404": errors.ModelNotFound,
    "UNAVAILABLE": errors.ServerUnreachable,
    "CANCELLED": errors.ServerUnreachable,
    "503": errors.ServerUnreachable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "499": errors.DeadlineExceeded,
    "RESOURCE_EXHAUSTED": errors.OutOfMemory,
}
"""Error class of a gRPC status name or an HTTP status code."""
MESSAGES: tuple[tuple[str, type[errors.HalimedeError], str], ...] = (
    (
        "maximum queue size",
        errors.ServerOverloaded,
        "the server at {} has a full queue. Back off and send again.",
    ),
    (
        "restricted, expecting header",
        errors.AccessDenied,
        "the server at {} wants its control key for this, and was given none or a wrong one. "
        "`halimede deploy` takes its file as --control-key-file.",
    ),
    (
        "not (?:at )?ready|is unloading|being loaded",
        errors.ServerUnreachable,
        "the server at {} is loading the model. Send again.",
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
PLACE = re.compile(r"(text|image) (\d+) (.*)", re.DOTALL)
"""Subject, index and rest of a message about one text or image."""
SCHEMES = ("grpc", "grpcs", "http", "https")
LARGEST_MESSAGE_BYTES = 2**31 - 1
CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", LARGEST_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", LARGEST_MESSAGE_BYTES),
    # gRPC waits up to two minutes between attempts, so that a restarted server is found late.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Behind a load balancer a connection may die unnoticed. While a call waits, gRPC pings twice at
    # most (max_pings_without_data), which is within a server's default limit of ping strikes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Requests go in turn to all addresses of a name, such as a headless service's.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    # A dead connection must not be shared with another embedder.
    ("grpc.use_local_subchannel_pool", 1),
]


Call = Callable[[Any, dict[str, float]], Awaitable[Any]]
"""Calls a method of tritonclient's client with the keywords that limit its time."""


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

    def for_grpc(self) -> dict[str, Any]:
        """Return the arguments for tritonclient's gRPC client."""
        named = {"root_certificates": self.ca_file, "certificate_chain": self.cert_file}
        named["private_key"] = self.key_file
        return {name: str(path) for name, path in named.items() if path is not None}

    def for_http(self) -> ssl.SSLContext:
        """Return the context for an HTTP client."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


class Connection:
    """A connection to one server. It is opened by the first call."""

    def __init__(self, url: str, tls: Tls) -> None:
        """Prepare a connection to a URL.

        Raises:
            InvalidInput: the URL is invalid, or is without TLS although certificates are given.
        """
        scheme, self.address = parse(url, tls)
        self.is_grpc = scheme.startswith("grpc")
        self.api: Any = importlib.import_module(f"tritonclient.{scheme.rstrip('s')}.aio")
        """tritonclient's module of the protocol."""
        self._tls = tls if scheme.endswith("s") else None
        self._client: Any = None

    async def call(self, send: Call, timeout_s: float) -> Any:
        """Return what `send` returns.

        Args:
            send: calls a method of tritonclient's client, given the client and the keywords that
                limit its time.
            timeout_s: maximum time.

        Raises:
            HalimedeError: the call failed.
        """
        # gRPC tells the server its deadline; HTTP has none to tell.
        time_limit = {"client_timeout": timeout_s} if self.is_grpc else {}
        with _Translated(self.address, timeout_s):
            answer = send(self._connected(), time_limit)
            return await (answer if self.is_grpc else asyncio.wait_for(answer, timeout_s))

    async def close(self) -> None:
        """Close the connection. A second call does nothing."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    def _connected(self) -> Any:
        if self._client is None:
            self._client = self.api.InferenceServerClient(self.address, **self._client_options())
        return self._client

    def _client_options(self) -> dict[str, Any]:
        if self.is_grpc:
            certificates = self._tls.for_grpc() if self._tls else {}
            return {"channel_args": CHANNEL_OPTIONS, "ssl": self._tls is not None, **certificates}
        context = self._tls.for_http() if self._tls else None
        return {"conn_timeout": None, "ssl": context is not None, "ssl_context": context}


class _Translated:
    """Context in which what tritonclient raises becomes an error of `halimede_ops.errors`."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, errors.HalimedeError) or not isinstance(error, Exception):
            return
        if isinstance(error, InferenceServerException):
            self._from_triton(error)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            raise timed_out(self.address, self.timeout_s) from None
        if is_connection_error(error, "aiohttp"):
            raise self._unreachable() from None
        if isinstance(error, MemoryError):
            raise errors.OutOfMemory("the client has no memory for this request.") from None

    def _from_triton(self, error: InferenceServerException) -> NoReturn:
        status = str(error.status() or "").removeprefix("StatusCode.")
        message = re.sub(r"^in ensemble '[^']*', ", "", _plain(error.message()))
        for pattern, worded_class, explanation in MESSAGES:
            if re.search(pattern, message, re.IGNORECASE):
                raise worded_class(explanation.format(self.address)) from None
        class_name, _, rest = message.partition(": ")
        error_class = getattr(errors, class_name, None)
        if isinstance(error_class, type) and issubclass(error_class, errors.HalimedeError):
            raise _placed(error_class, rest) from None
        error_class = CODES.get(status, errors.HalimedeError)
        if error_class is errors.DeadlineExceeded:
            raise timed_out(self.address, self.timeout_s) from None
        if error_class is errors.ServerUnreachable:
            raise self._unreachable() from None
        raise error_class(message) from None

    def _unreachable(self) -> errors.ServerUnreachable:
        return errors.ServerUnreachable(
            f"no Triton answers at {self.address}. Start one with `make serve`, or give its "
            "address as url."
        )


def _placed(error_class: type[errors.HalimedeError], message: str) -> errors.HalimedeError:
    """The server's error. Its text is all that Triton passes on, so the index is read from it."""
    place = PLACE.fullmatch(message)
    if place is None or not issubclass(error_class, errors.InvalidInput):
        return error_class(message)
    return error_class(place[3], subject=place[1], index=int(place[2]))


def _plain(message: str) -> str:
    """Return the text of an error: over HTTP tritonclient sometimes gives the JSON around it."""
    try:
        return str(json.loads(message)["error"])
    except (ValueError, KeyError, TypeError):
        return message


def parse(url: str, tls: Tls | None = None) -> tuple[str, str]:
    """Split a server's URL into its protocol (grpc, grpcs, http or https) and `host:port`.

    Raises:
        InvalidInput: the URL is invalid, or is without TLS although `tls` has certificates.
    """
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    if parts.scheme not in SCHEMES or not parts.netloc or "@" in parts.netloc:
        given = "has a user or password" if "@" in url else f"is {url!r}"
        raise errors.InvalidInput(
            f"url {given}; give host:port, grpc://host:port or http://host:port, with TLS "
            "grpcs:// or https://."
        )
    if tls not in (None, Tls()) and not parts.scheme.endswith("s"):
        raise errors.InvalidInput(
            f"certificates are given, but {url} is without TLS; "
            f"write {parts.scheme}s://{parts.netloc}."
        )
    return parts.scheme, parts.netloc
