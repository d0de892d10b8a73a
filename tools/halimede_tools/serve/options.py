"""Options of a server, and the arguments of tritonserver for them."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, NonNegativeInt, PrivateAttr, field_validator, model_validator

from halimede_launch import start
from halimede_ops.errors import ServeError
from halimede_tools.serve import addresses
from halimede_tools.serve.addresses import LOOPBACK

MAX_PORT = 65535
CONNECTION_AGE_MS = 30_000
"""Clients reconnect this often, and so find servers that joined or left a DNS name."""
CONNECTION_GRACE_MS = 60_000
"""Time that the requests of an old connection have to end."""
POOLED_MESSAGES = 1
"""Request messages that each of Triton's threads keeps for reuse. A message never shrinks: with
Triton's default of 8, a few requests of 4 MB cost 100 MB until the server ends."""
LOG_LEVELS = ("error", "warning", "info", "verbose")


class Options(BaseModel):
    """Options of a server."""

    host: str = LOOPBACK
    """Address to listen on, IPv4 or IPv6; loopback by default. A host name becomes its address."""
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    log_level: str = "warning"
    """error, warning, info or verbose."""
    models: tuple[str, ...] = ()
    """Models to serve, without their composing models; empty: all of the repository."""
    steps: bool = False
    """Whether the wheel serves each ensemble's steps as models of their own, as NVIDIA's container
    does. By default one process runs all steps."""
    response_cache_mb: NonNegativeInt = 0
    """Size of each model's response cache, in MB; 0: no cache."""
    tls_cert: Path | None = None
    """PEM certificate of the server: gRPC uses TLS. HTTP has no TLS and stays on loopback."""
    tls_key: Path | None = None
    """PEM key of the certificate."""
    tls_client_ca: Path | None = None
    """PEM certificates that sign clients. Clients without a certificate are refused."""
    control_key_file: Path | None = None
    """File with the key that model control requires. Without a file, model control is open on
    loopback and closed on every other address."""

    trace_url: str = ""
    """OpenTelemetry collector for traces, such as http://127.0.0.1:4318/v1/traces."""
    trace_every: int = 100
    """Trace one request in N. A request whose caller traces it is always traced."""
    _random_key: str = PrivateAttr(default_factory=start.random_key)

    @field_validator("host")
    @classmethod
    def _resolve(cls, host: str) -> str:
        return addresses.resolve(host)

    @model_validator(mode="after")
    def _check_ports(self) -> Options:
        names: dict[int, str] = {}
        for name, port in self.ports().items():
            flag = f"--{name.lower()}-port"
            if not 1 <= port <= MAX_PORT:
                raise ServeError(f"{name} port is {port}; give 1 to {MAX_PORT} with {flag}.")
            if port in names:
                raise ServeError(
                    f"{names[port]} and {name} have the same port {port}; give another with {flag}."
                )
            names[port] = name
        return self

    @model_validator(mode="after")
    def _check_response_cache(self) -> Options:
        if self.steps and self.response_cache_mb:
            raise ServeError("the steps have no response cache; leave out --steps or the cache.")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> Options:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ServeError("TLS needs both --tls-cert and --tls-key.")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ServeError("--tls-client-ca needs --tls-cert and --tls-key beside it.")
        for path in (self.tls_cert, self.tls_key, self.tls_client_ca, self.control_key_file):
            if path is not None and not os.access(path, os.R_OK):
                raise ServeError(f"{path} cannot be read.")
        return self

    @property
    def http_host(self) -> str:
        """Address that HTTP listens on: loopback if gRPC uses TLS."""
        return self.host if self.tls_cert is None else LOOPBACK

    @property
    def grpc_address(self) -> str:
        """host:port at which this machine reaches the gRPC endpoint."""
        return addresses.joined(self.host, self.grpc_port)

    @property
    def http_address(self) -> str:
        """host:port at which this machine reaches the HTTP endpoint."""
        return addresses.joined(self.http_host, self.http_port)

    @property
    def metrics_address(self) -> str:
        """host:port at which this machine reaches the metrics."""
        return addresses.joined(self.host, self.metrics_port)

    def ports(self) -> dict[str, int]:
        """Protocol → port."""
        return {"HTTP": self.http_port, "gRPC": self.grpc_port, "metrics": self.metrics_port}

    def arguments(self, inside: str | None = None) -> list[str]:
        """The arguments of tritonserver, for the wheel and for NVIDIA's container.

        `inside` is the address to listen on in a container. Its ports are published on `host`.
        """
        models = self.models or ("*",)
        return [
            "--model-control-mode=explicit",
            *[f"--load-model={model}" for model in models],
            "--disable-auto-complete-config",
            "--exit-on-error=true",
            "--strict-readiness=true",
            f"--http-address={addresses.for_http(inside or self.http_host)}",
            f"--http-port={self.http_port}",
            f"--grpc-address={addresses.bracketed(inside or self.host)}",
            f"--grpc-port={self.grpc_port}",
            f"--grpc-infer-allocation-pool-size={POOLED_MESSAGES}",
            f"--grpc-max-connection-age={CONNECTION_AGE_MS}",
            f"--grpc-max-connection-age-grace={CONNECTION_GRACE_MS}",
            f"--metrics-address={addresses.for_http(inside or self.host)}",
            f"--metrics-port={self.metrics_port}",
            *_log_arguments(self.log_level),
            *self._tls_arguments(),
            *self._restrictions(),
            *self._trace_arguments(),
        ]

    def _trace_arguments(self) -> list[str]:
        if not self.trace_url:
            return []
        return [
            "--trace-config=mode=opentelemetry",
            "--trace-config=level=TIMESTAMPS",
            "--trace-config=count=-1",
            f"--trace-config=rate={self.trace_every}",
            f"--trace-config=opentelemetry,url={self.trace_url}",
            "--trace-config=opentelemetry,resource=service.name=triton",
        ]

    def _tls_arguments(self) -> list[str]:
        if self.tls_cert is None:
            return []
        arguments = [f"--grpc-server-cert={self.tls_cert}", f"--grpc-server-key={self.tls_key}"]
        if self.tls_client_ca is None:
            return ["--grpc-use-ssl=true", *arguments]
        return ["--grpc-use-ssl-mutual=true", *arguments, f"--grpc-root-cert={self.tls_client_ca}"]

    @property
    def control_key(self) -> str:
        """The key that model control requires; empty: none. Without a key file, it is random on
        every address but loopback, so that only this process knows it.
        """
        if self.control_key_file is not None:
            return self.control_key_file.read_text().strip()
        return "" if addresses.is_loopback(self.host) else self._random_key

    def _restrictions(self) -> list[str]:
        return start.restrictions(self.control_key) if self.control_key else []


def _log_arguments(level: str) -> list[str]:
    if level not in LOG_LEVELS:
        raise ServeError(f"log level {level!r} is unknown; use one of {', '.join(LOG_LEVELS)}")
    rank = LOG_LEVELS.index(level)
    return [
        "--log-error=true",
        f"--log-warning={str(rank >= 1).lower()}",
        f"--log-info={str(rank >= 2).lower()}",
        f"--log-verbose={int(rank >= 3)}",
    ]
