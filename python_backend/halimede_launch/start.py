"""Starts NVIDIA's Triton like the wheel's: `python3 -m halimede_launch.start tritonserver …`.

Triton alone would differ in three ways. `--load-model=*` would load every candidate. Its C++
backends do not check checksums. A server that lost a process would run on.

NVIDIA's container holds only this package, `halimede_repository` and `halimede_ops`: it imports the
standard library and nothing else.
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
"""APIs that control the server or access its memory. Inference, metadata and health stay open."""
CONTROL_HEADER = "halimede-control-key"
"""HTTP header of the control key. Over gRPC its name starts with `triton-grpc-protocol-`."""


def start(command: Sequence[str]) -> int:
    """Run Triton's command until it ends, and return its exit status.

    `--load-model=*` loads the models that the wheel's Triton would load. Two arguments are ours,
    and are not passed on: `--control-closed` closes the control APIs, `--control-key-file=PATH`
    opens them to clients that send the key in this file.

    Raises:
        InvalidModel: a file of a model differs from its checksum.
        ModelNotFound: the repository does not have a model, or the model is not built.
    """
    [repository] = [Path(path) for path in _values(command, REPOSITORY)]
    requested = tuple(name for name in _values(command, LOAD) if name != EVERYTHING)
    models = configs.models_to_load(repository, requested)
    for name in models:
        _check(repository, name)
    replaced = (LOAD, CONTROL_KEY_FILE, CONTROL_CLOSED)
    kept = [argument for argument in command if not argument.startswith(replaced)]
    return watch.run([*kept, *_restrictions(command), *[f"{LOAD}{name}" for name in models]])


def restrictions(key: str) -> list[str]:
    """Arguments of tritonserver that restrict its control APIs to clients with this key."""
    return [
        f"--grpc-restricted-protocol={CONTROL_APIS}:{CONTROL_HEADER}={key}",
        f"--http-restricted-api={CONTROL_APIS}:{CONTROL_HEADER}={key}",
    ]


def random_key() -> str:
    """A new random key. Restricting the APIs to a key that nobody knows closes them."""
    return secrets.token_hex(16)


def _restrictions(command: Sequence[str]) -> list[str]:
    for path in _values(command, CONTROL_KEY_FILE):
        return restrictions(Path(path).read_text().strip())
    return restrictions(random_key()) if CONTROL_CLOSED in command else []


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
