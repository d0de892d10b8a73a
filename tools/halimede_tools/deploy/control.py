"""Model control of a running server: what is loaded, load, unload."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from halimede.pipeline import loop
from halimede.providers.triton.connection import Call, Connection, Tls
from halimede_launch.start import CONTROL_HEADER
from halimede_ops.errors import AccessDenied, DeployError, HalimedeError, ServerError

LOAD_TIMEOUT_S = 600.0
"""Longest wait for one model to be loaded and warm."""
TIMEOUT_S = 30.0


class Control:
    """One server's model control, connected at the first call."""

    def __init__(self, url: str, tls: Tls | None = None, key: str = "") -> None:
        """Nothing is sent yet; `key` is what the server wants for model control."""
        self._triton = Connection(url, tls or Tls())
        header = CONTROL_HEADER
        if self._triton.is_grpc:
            header = f"triton-grpc-protocol-{CONTROL_HEADER}"
        self._headers = {header: key} if key else None

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *error: Any) -> None:
        loop.shared().wait(self._triton.close())

    @property
    def address(self) -> str:
        """host:port of the server."""
        return self._triton.address

    def loaded(self) -> dict[str, set[int]]:
        """Model → the versions of it that are ready.

        Raises:
            ServerUnreachable: nothing answers.
            AccessDenied: the server wants a key, or another one.
        """
        index = self._call(
            lambda client, limit: client.get_model_repository_index(headers=self._headers, **limit),
            TIMEOUT_S,
        )
        if self._triton.is_grpc:
            told = [(one.name, one.version, one.state) for one in index.models]
        else:
            told = [(one["name"], one.get("version"), one.get("state")) for one in index]
        ready: dict[str, set[int]] = {}
        for name, version, state in told:
            if state == "READY":
                ready.setdefault(name, set()).add(int(version))
        return ready

    def load(self, models: Iterable[str]) -> None:
        """Load each model, or load it anew where it changed: it takes requests once it is warm.

        Raises:
            DeployError: one cannot be loaded; the server goes on with what it had.
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
        """Serve these ensembles and their steps no longer; what is under way is answered.

        Raises:
            HalimedeError: as `loaded`.
        """
        for model in models:
            self._call(functools.partial(self._unload, model), TIMEOUT_S)

    def _load(self, model: str, client: Any, limit: dict[str, float]) -> Any:
        return client.load_model(model, headers=self._headers, **limit)

    def _unload(self, model: str, client: Any, limit: dict[str, float]) -> Any:
        return client.unload_model(model, headers=self._headers, unload_dependents=True, **limit)

    def _call(self, send: Call, timeout_s: float) -> Any:
        return loop.shared().wait(self._triton.call(send, timeout_s))


def _reason(message: str) -> str:
    """What Triton says at the end of its own words, in one line and without paths."""
    last = message.strip().splitlines()[0].rsplit(": ", 1)[-1]
    return re.sub(r"/\S+", "…", last).rstrip(".;") + "."
