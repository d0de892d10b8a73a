"""Names of models: what a server can serve, and which names would share folders.

A model has a folder for each of its ensembles and steps: `m`, `m-int8`, `m-int8-onnx`,
`m-tokenizer`, `m-image-pixels`, each also with `-candidate`. A second model that is called as one
of them would overwrite it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from halimede_ops.errors import InvalidInput
from halimede_ops.spec import FILE_NAME
from halimede_repository.configs import ALIASES, CONFIG, TOWERS, parameter

MAX_LETTERS = 100
"""Longest name of a model. Folders add suffixes to it, and file systems allow 255 bytes."""
SUFFIXES = (
    "fp16", "int8", "onnx", "tokenizer", "pooler", "image", "pixels", "candidate", "query",
    "document", "maxsim", *(alias[1:] for alias in ALIASES),
)  # fmt: skip
"""What the name of a folder has after its model's name, each with a hyphen in front."""
_FUSION = 'backend: "fusion"'
"""Line of a fusion's config."""
_SERVABLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_OF_FOLDER = re.compile(rf"(-({'|'.join(SUFFIXES)}))+")


def check_servable(name: str) -> None:
    """Raise unless a model can be served under this name.

    Raises:
        InvalidInput: it has other letters than ASCII's, or too many.
    """
    if not _SERVABLE.fullmatch(name):
        raise InvalidInput(
            f"name is {name[:MAX_LETTERS]!r}; use letters a to z, digits, '-', '_' and '.', and "
            "begin with a letter or a digit. Pass another one with --name."
        )
    if len(name) > MAX_LETTERS:
        raise InvalidInput(
            f"name has {len(name)} letters; the longest has {MAX_LETTERS}. Pass another one with "
            "--name."
        )


def check_unshared(name: str, repository: Path, *, fusion: bool = False) -> None:
    """Raise unless the folders of a model, or of a fusion, of this name are no other model's.

    Raises:
        InvalidInput: the name is that of a folder of another model, or the reverse; or a fusion
            has the name of a model, or the reverse.
    """
    written = repository / name / CONFIG
    config = written.read_text("utf-8") if written.exists() else ""
    if config and (_FUSION in config) is not fusion:
        kind = "model" if fusion else "fusion"
        raise InvalidInput(
            f"name is {name!r}, and the repository has a {kind} of this name. Pass another one "
            "with --name."
        )
    for other in sorted(models(repository) - {name, *towers(name, repository)}):
        for whole, part in ((name, other), (other, name)):
            if whole.startswith(part) and _OF_FOLDER.fullmatch(whole, len(part)):
                raise InvalidInput(
                    f"name is {name!r}, and the repository has a model {other!r}: {whole} is the "
                    f"name of a folder of {part}. Pass another one with --name."
                )


def towers(name: str, repository: Path) -> set[str]:
    """Names of the models for queries and for documents that a router of this name calls."""
    config = repository / name / CONFIG
    if not config.exists():
        return set()
    text = config.read_text("utf-8")
    return {found for found in (parameter(text, key) for key in TOWERS) if found}


def models(repository: Path) -> set[str]:
    """Names of the models that a repository has, served or not, without suffixes."""
    found = set()
    for path in repository.glob(f"*/*/{FILE_NAME}"):
        try:
            found.add(str(json.loads(path.read_text("utf-8"))["name"]))
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged: whoever reads the model says so
    return found
