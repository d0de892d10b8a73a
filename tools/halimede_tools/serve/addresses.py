"""Addresses that a server listens on, and those at which this machine reaches it."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from halimede_ops.errors import ServeError

LOOPBACK = "127.0.0.1"


def resolve(host: str) -> str:
    """The IP address of a host name or address; of several, the first IPv4 address.

    Triton's HTTP server takes addresses only: it would listen on 255.255.255.255 for a name.

    Raises:
        ServeError: the host has no address, or one that Triton cannot listen on.
    """
    name = host.removeprefix("[").removesuffix("]") or " "  # an empty name would be all addresses
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or "it is not a host name"
        raise ServeError(
            f"host {host!r} has no address: {reason}. Give an address or a name of this machine "
            "with --host, or 0.0.0.0 for all its addresses."
        ) from None
    answers.sort(key=lambda answer: answer[0] != socket.AF_INET)
    address = str(answers[0][4][0])
    if ":" in address and ipaddress.ip_address(address).is_link_local:
        raise ServeError(
            f"host {host!r} is the link-local address {address}, which Triton cannot listen on. "
            "Give another address with --host."
        )
    return address


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    return ipaddress.ip_address(address).is_loopback


def is_unspecified(address: str) -> bool:
    """Whether it stands for all addresses of this machine."""
    return ipaddress.ip_address(address).is_unspecified


def joined(address: str, port: int) -> str:
    """`address:port` as in a URL, at which this machine reaches the server."""
    if is_unspecified(address):
        address = "::1" if ":" in address else LOOPBACK
    return f"{bracketed(address)}:{port}"


def bracketed(address: str) -> str:
    """The address as in a URL: an IPv6 address has brackets. Triton's gRPC takes it so."""
    return f"[{address}]" if ":" in address else address


def for_http(address: str) -> str:
    """The address as Triton's HTTP servers take it."""
    return f"ipv6:{address}" if ":" in address else address


def check_port(name: str, address: str, port: int) -> None:
    """Raise unless the port is free at the address.

    Raises:
        ServeError: it is taken, it needs root, or the address is not of this machine.
    """
    flag = f"--{name.lower()}-port"
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                message = (
                    f"{address} is not an address of this machine. Give one of its addresses with "
                    "--host, or 0.0.0.0 for all of them."
                )
            elif error.errno == errno.EADDRINUSE:
                message = (
                    f"{name} port {port} on {address} is taken. Stop what uses it, or choose "
                    f"another with {flag}."
                )
            else:
                message = (
                    f"{name} port {port} on {address} cannot be listened on: "
                    f"{os.strerror(error.errno or 0)}. Choose another with {flag}; ports below "
                    "1024 may need root."
                )
            raise ServeError(message) from None
