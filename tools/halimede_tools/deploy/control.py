"""Model control of a running server: list, load and unload models."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from halimede.pipeline import loop
from halimede.providers.triton.connection import Connection, Send, Tls
from halimede_launch.start import CONTROL_HEADER
from halimede_ops.errors import AccessDenied, DeployError, HalimedeError, ServerError

LOAD_TIMEOUT_S = 600.0
"""Longest time to load and warm up one model."""
TIMEOUT_S = 30.0


class Control:
    """Model control of one server. The first call connects."""

    def __init__(self, url: str, tls: Tls | None = None, key: str = "") -> None:
        """Send nothing yet. `key` is the server's key for model control; empty: none."""
        self._triton = Connection(url, tls or Tls())
        header = CONTROL_HEADER
        if self._triton.is_grpc:
            header = f"triton-grpc-protocol-{CONTROL_HEADER}"
        self._headers = {header: key} if key else None

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *error: object) -> None:
        loop.shared().wait(self._triton.close())

    @property
    def address(self) -> str:
        """host:port of the server."""
        return self._triton.address

    def loaded(self) -> dict[str, set[int]]:
        """Model → its versions that are ready.

        Raises:
            ServerUnreachable: the server does not answer.
            AccessDenied: the key is missing or wrong.
        """
        index = self._call(
            lambda client, limit: client.get_model_repository_index(headers=self._headers, **limit),
            TIMEOUT_S,
        )
        if self._triton.is_grpc:
            rows = [(row.name, row.version, row.state) for row in index.models]
        else:
            rows = [(row["name"], row.get("version"), row.get("state")) for row in index]
        ready: dict[str, set[int]] = {}
        for name, version, state in rows:
            if state == "READY":
                ready.setdefault(name, set()).add(int(version))
        return ready

    def load(self, models: Iterable[str]) -> None:
        """Load each model, or reload it if it changed. It gets requests once it is warm.

        Raises:
            DeployError: a model cannot be loaded; the server keeps what it had.
            HalimedeError: as `loaded`.
        """
        for model in models:
            try:
                self._call(functools.partial(self._load, model), LOAD_TIMEOUT_S)
            except (ServerError, AccessDenied):
                raise
            except HalimedeError as error:
                raise DeployError(
                    f"{model} does not load at {self.address}: {_reason(str(error))}"
                ) from None

    def unload(self, models: Iterable[str]) -> None:
        """Unload these ensembles and their steps. Open requests are answered.

        Raises:
            HalimedeError: as `loaded`.
        """
        for model in models:
            self._call(functools.partial(self._unload, model), TIMEOUT_S)

    def _load(self, model: str, client: Any, limit: dict[str, float]) -> Any:
        return client.load_model(model, headers=self._headers, **limit)

    def _unload(self, model: str, client: Any, limit: dict[str, float]) -> Any:
        return client.unload_model(model, headers=self._headers, unload_dependents=True, **limit)

    def _call(self, send: Send, timeout_s: float) -> Any:
        return loop.shared().wait(self._triton.call(send, timeout_s))


def _reason(message: str) -> str:
    """The last part of Triton's message, in one line and without paths."""
    last = message.strip().splitlines()[0].rsplit(": ", 1)[-1]
    return re.sub(r"/\S+", "…", last).rstrip(".;") + "."
