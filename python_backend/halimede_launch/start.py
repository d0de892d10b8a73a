"""Start NVIDIA's Triton as the wheel's: `python3 -m halimede_launch.start tritonserver …`.

Triton's own `--load-model=*` would load every candidate, its C++ backends read files whatever
their sums, and a server that lost a process goes on. In NVIDIA's container lie this folder and
`halimede_ops` alone, so this imports nothing but the standard library beside them.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from halimede_launch import watch
from halimede_ops.errors import InvalidModel, ModelNotFound
from halimede_repository import checksums, configs

REPOSITORY = "--model-repository="
LOAD = "--load-model="
EVERYTHING = "*"
CONTROL_KEY_FILE = "--control-key-file="
CONTROL_CLOSED = "--control-closed"
CONTROL_APIS = "model-repository,shared-memory,trace,logging"
"""APIs that change the server or reach its memory. Inference, metadata and health stay open."""
CONTROL_HEADER = "halimede-control-key"
"""Header of the key over HTTP; over gRPC `triton-grpc-protocol-` stands before it."""


def start(command: Sequence[str]) -> int:
    """Exit status of Triton's command, once it has ended.

    `--load-model=*` stands for the models that the wheel's Triton would load. Two arguments are
    ours: with `--control-closed` nobody may control models, with `--control-key-file=…` who has
    that key.

    Raises:
        InvalidModel: a file of a model is not what was built.
        ModelNotFound: a model is not in the repository, or not built.
    """
    [repository] = [Path(path) for path in _values(command, REPOSITORY)]
    asked = tuple(name for name in _values(command, LOAD) if name != EVERYTHING)
    models = configs.to_load(repository, asked)
    for name in models:
        _check(repository, name)
    ours = (LOAD, CONTROL_KEY_FILE, CONTROL_CLOSED)
    rest = [argument for argument in command if not argument.startswith(ours)]
    return watch.run([*rest, *_restrictions(command), *[f"{LOAD}{name}" for name in models]])


def restrictions(key: str) -> list[str]:
    """Arguments of tritonserver: its control APIs want this key."""
    return [
        f"--grpc-restricted-protocol={CONTROL_APIS}:{CONTROL_HEADER}={key}",
        f"--http-restricted-api={CONTROL_APIS}:{CONTROL_HEADER}={key}",
    ]


def nobodys_key() -> str:
    """A key that is told to nobody."""
    return secrets.token_hex(16)


def _restrictions(command: Sequence[str]) -> list[str]:
    for path in _values(command, CONTROL_KEY_FILE):
        return restrictions(Path(path).read_text().strip())
    return restrictions(nobodys_key()) if CONTROL_CLOSED in command else []


def _check(repository: Path, name: str) -> None:
    served = configs.read(repository, name)
    for folder in (served.folder, *served.steps.values()):
        try:
            checksums.check(folder)
        except InvalidModel as error:
            raise InvalidModel(f"model {name} did not load: {error}") from None


def _values(command: Sequence[str], flag: str) -> list[str]:
    return [argument.removeprefix(flag) for argument in command if argument.startswith(flag)]


if __name__ == "__main__":
    try:
        sys.exit(start(sys.argv[1:]))
    except (InvalidModel, ModelNotFound, OSError) as error:
        sys.exit(f"error: {error}")
