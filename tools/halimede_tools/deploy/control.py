"""Model control of a running server: list, load and unload models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tritonclient.grpc import service_pb2 as messages

from halimede.providers.triton import connection
from halimede_launch.start import CONTROL_HEADER
from halimede_ops.errors import AccessDenied, DeployError, HalimedeError, ServerError

LOAD_TIMEOUT_S = 600.0
"""Longest time to load and warm up one model."""
TIMEOUT_S = 30.0


class Control:
    """Model control of one server. The first call connects."""

    def __init__(self, url: str, tls: connection.Tls | None = None, key: str = "") -> None:
        """Send nothing yet. `key` is the server's key for model control; empty: none."""
        self._triton = connection.connect(url, tls or connection.Tls())
        header = CONTROL_HEADER
        if self._triton.address.is_grpc:
            header = f"triton-grpc-protocol-{CONTROL_HEADER}"
        self._headers = {header: key} if key else {}

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *error: object) -> None:
        self._triton.close()

    @property
    def address(self) -> str:
        """host:port of the server."""
        return str(self._triton.address)

    def loaded(self) -> dict[str, set[int]]:
        """Model → its versions that are ready.

        Raises:
            ServerUnreachable: the server does not answer.
            AccessDenied: the key is missing or wrong.
        """
        index = self._ask("RepositoryIndex", messages.RepositoryIndexRequest(), TIMEOUT_S)
        ready: dict[str, set[int]] = {}
        for model in index.models:
            if model.state == "READY":
                ready.setdefault(model.name, set()).add(int(model.version))
        return ready

    def load(self, models: Iterable[str]) -> None:
        """Load each model, or reload it if it changed. It gets requests once it is warm.

        Raises:
            DeployError: a model cannot be loaded; the server keeps what it had.
            HalimedeError: as `loaded`.
        """
        for model in models:
            try:
                message = messages.RepositoryModelLoadRequest(model_name=model)
                self._ask("RepositoryModelLoad", message, LOAD_TIMEOUT_S)
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
            message = messages.RepositoryModelUnloadRequest(model_name=model)
            message.parameters["unload_dependents"].bool_param = True
            self._ask("RepositoryModelUnload", message, TIMEOUT_S)

    def _ask(self, method: str, message: Any, timeout_s: float) -> Any:
        start = self._triton.start
        return start(method, message, timeout_s, headers=self._headers, may_block=True).result()


def _reason(message: str) -> str:
    """The last part of Triton's message, in one line and without paths."""
    last = message.strip().splitlines()[0].rsplit(": ", 1)[-1]
    return re.sub(r"/\S+", "…", last).rstrip(".;") + "."
