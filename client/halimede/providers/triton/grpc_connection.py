"""A connection to a Triton server over gRPC, by the synchronous stub.

`grpc.aio` is not used: it polls with a thread of the process, and survives neither a fork nor
gevent.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from halimede.pipeline.forks import ForkGate
from halimede.pipeline.sharing import Mapped, completed
from halimede.pipeline.waiting import Future
from halimede.providers.http_errors import timed_out
from halimede.providers.triton.connection import Address, Tls, explained
from halimede_ops import errors

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
    # A name is resolved again when a connection ends; gRPC's own minimum of 30 s would miss servers
    # that join and leave in an upgrade.
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # Requests go in turn to all addresses of a name, such as a headless service's.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    # A dead connection must not be shared with another embedder.
    ("grpc.use_local_subchannel_pool", 1),
]
HTTP1_LIMIT_S = 0.5
REASONED = {
    "INVALID_ARGUMENT": errors.InvalidInput,
    "OUT_OF_RANGE": errors.InvalidInput,
    "NOT_FOUND": errors.ModelNotFound,
}
"""Error class of a status whose message is Triton's own, and says what to change."""


_calls = ForkGate()
"""gRPC survives a fork only while no thread is in it: otherwise the child may crash."""


CLOSE_WAIT_S = 2.0
"""Longest wait for gRPC to close a channel on which a call was cut off."""


class GrpcConnection:
    """A channel to one server."""

    def __init__(self, address: Address, tls: Tls) -> None:
        self.address = address
        self._tls = tls
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._stub: Any = None
        self._is_closed = False
        self._is_cut_off = False
        """Whether Ctrl-C cut gRPC off while it made a call: closing the channel may never end."""

    def start(
        self,
        method: str,
        message: Any,
        timeout_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        may_block: bool = False,
    ) -> Future[Any]:
        """Start a request: see `Connection.start`."""
        call = getattr(self._stub or self._open(), method)
        metadata = tuple(headers.items()) if headers else None
        future: Any = None
        _calls.begin()
        try:
            if may_block:  # in the caller's thread: gRPC's own thread takes 0.2 ms more
                return completed(call(message, timeout=timeout_s, metadata=metadata))
            future = call.future(message, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise self._translated(error, timeout_s) from None
        except ValueError:  # the channel was closed
            raise self.address.unreachable() from None
        except KeyboardInterrupt:
            self._is_cut_off = True
            raise
        finally:
            if future is None:
                _calls.end()
        future.add_done_callback(_calls.end)

        def result(done: Any) -> Any:
            try:
                return done.result()
            except grpc.RpcError as error:
                raise self._translated(error, timeout_s) from None
            except grpc.FutureCancelledError:
                raise self.address.unreachable() from None

        return Mapped(future, result)

    def close(self) -> None:
        """End the requests under way and close the channel."""
        with self._lock:
            self._is_closed = True
            channel, self._channel, self._stub = self._channel, None, None
        if channel is not None and self._is_cut_off and not sys.is_finalizing():
            closing = threading.Thread(target=channel.close, name="halimede-close", daemon=True)
            closing.start()
            closing.join(CLOSE_WAIT_S)
        elif channel is not None:
            channel.close()

    def _open(self) -> Any:
        with self._lock:
            if self._is_closed:
                raise self.address.unreachable()
            if self._channel is None:
                _cooperate_with_gevent()
                self._channel = self._connected()
                self._stub = GRPCInferenceServiceStub(self._channel)
            return self._stub

    def _connected(self) -> grpc.Channel:
        options = [*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(not self.address.is_loopback))]
        if not self.address.is_secure:
            return grpc.insecure_channel(self.address.host, options)
        credentials = grpc.ssl_channel_credentials(*self._tls.for_grpc())
        return grpc.secure_channel(self.address.host, credentials, options)

    def _translated(self, error: Any, timeout_s: float) -> errors.HalimedeError:
        status, message = error.code().name, error.details() or ""
        known = explained(message, self.address)
        if known is not None:
            return known
        if status in REASONED:
            return REASONED[status](message)
        if status == "DEADLINE_EXCEEDED":
            return timed_out(str(self.address), timeout_s)
        if status == "RESOURCE_EXHAUSTED":
            return errors.OutOfMemory(f"the server at {self.address} has no room for the request.")
        if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return errors.AccessDenied(f"{self.address} refuses access ({status}).")
        if status == "UNIMPLEMENTED":
            return self.address.not_triton("it does not know the request (UNIMPLEMENTED)")
        if "Socket closed" in message and _answers_http1(self.address.host):
            return self.address.not_triton("it answers HTTP/1")
        if status in ("UNAVAILABLE", "CANCELLED"):
            return self.address.unreachable()
        is_lasting = status in ("ALREADY_EXISTS", "FAILED_PRECONDITION")
        error_class = errors.HalimedeError if is_lasting else errors.ServerError
        return error_class(f"the server at {self.address} failed ({status}).")


def _answers_http1(host: str) -> bool:
    """Whether a server that ended a gRPC connection is one for HTTP/1."""
    name, _, port = host.rpartition(":")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), HTTP1_LIMIT_S) as connection:
            connection.settimeout(HTTP1_LIMIT_S)
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return connection.recv(5) == b"HTTP/"
    except OSError:
        return False


def _cooperate_with_gevent() -> None:
    """Let gRPC wait as a greenlet in a program that `gevent.monkey` has patched."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        from grpc.experimental import gevent  # type: ignore[import-untyped]

        gevent.init_gevent()
