"""The space of a model: what decides its vectors beside weights, configs and tokenizer.json.

Each entry is left out where a folder has nothing of it, so that spaces of stored vectors stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halimede_ops import text
from halimede_repository.checksums import sha256
from halimede_tools.build.kinds.files import read_json

WITHOUT_EFFECT = ("decoder", "padding", "truncation")
"""Parts of a tokenizer that change no token of a text: padding and the token limit are set by the
build."""
TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", text.FILE_NAME,
)  # fmt: skip
NAMES_CODE = "auto_map"
"""Key of a config that names Python code of the folder."""
OWN_MODULES = "sentence_transformers."
FOLDER_NAMES = ("name_or_path", "tokenizer_file", "transformers_version", "special_tokens_map_file")
"""Keys of TOKENIZER_FILES that tell where a tokenizer came from."""
TRANSFORMER_DEFAULTS = {"transformer_task": "feature-extraction"}
"""Keys of sentence-transformers' config of a transformer, with the value that changes nothing."""
TRANSFORMER_APART = ("max_seq_length", "modality_config", "module_output_name")
"""Keys of the same config: the token limit counts by itself, the others name outputs."""


def further(model: Any, folder: Path, graph: Path | None) -> dict[str, Any]:
    """What else decides a loaded model's vectors; `graph` is the ONNX file that it is built from,
    None for PyTorch weights.
    """
    entries = {
        "external_weights": [sha256(path) for path in external_files(graph)] if graph else [],
        "tokenizer_files": _tokenizer_files(folder) if _is_changed(model.tokenizer, folder) else {},
        "truncation_side": getattr(model.tokenizer, "truncation_side", "").removesuffix("right"),
        "transformer": _transformer(folder),
        "modules": _modules(folder),
        "inner_configs": _configs(folder),
        "code": _code(folder),
    }
    return {f"further_{name}": entry for name, entry in entries.items() if entry}


def external_files(graph: Path) -> list[Path]:
    """The files that hold weights of an ONNX graph, in order of name."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    names = {ExternalDataInfo(entry).location for entry in tensors if uses_external_data(entry)}
    return [graph.parent / name for name in sorted(names)]


def _is_changed(tokenizer: Any, folder: Path) -> bool:
    """Whether the tokenizer that is served is another than tokenizer.json: its config, its special
    tokens or its vocabulary changed it when it was loaded.
    """
    from tokenizers import Tokenizer

    if not hasattr(tokenizer, "backend_tokenizer"):
        return False
    files = _sorted(folder, text.FILE_NAME)
    return bool(files) and _tokenizer(Tokenizer.from_file(str(files[0]))) != _tokenizer(
        tokenizer.backend_tokenizer
    )


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    parts = json.loads(tokenizer.to_str())
    return {key: value for key, value in parts.items() if key not in WITHOUT_EFFECT}


def _tokenizer_files(folder: Path) -> dict[str, Any]:
    found = {}
    for path in (path for name in TOKENIZER_FILES for path in _sorted(folder, name)):
        fields = read_json(path)
        found[str(path.relative_to(folder))] = {
            key: value for key, value in fields.items() if key not in FOLDER_NAMES
        }
    return found


def _transformer(folder: Path) -> dict[str, Any]:
    """What sentence-transformers' config of a transformer changes, such as `do_lower_case`."""
    return {
        f"{path.relative_to(folder)} {key}": value
        for path in _sorted(folder, "sentence_*_config.json")
        for key, value in read_json(path).items()
        if value and key not in TRANSFORMER_APART and TRANSFORMER_DEFAULTS.get(key) != value
    }


def _modules(folder: Path) -> list[Any]:
    """The modules with their folders, where those are not in order of name or have arguments."""
    modules = _listed(folder)
    paths = [module.get("path", "") for module in modules]
    plain = paths == sorted(paths) and not any(module.get("kwargs") for module in modules)
    return [] if plain else [[m.get("path"), m.get("type"), m.get("kwargs")] for m in modules]


def _configs(folder: Path) -> dict[str, Any]:
    """Configs of modules within modules, and of adapters."""
    configs = _sorted(folder, "config.json")
    inner = [path for path in configs if len(path.relative_to(folder).parts) > 2]
    found = [*inner, *_sorted(folder, "adapter_config.json")]
    return {str(path.relative_to(folder)): read_json(path) for path in found}


def _code(folder: Path) -> dict[str, str]:
    """The folder's Python files, where its configs name some to run."""
    own = any(NAMES_CODE in read_json(path) for path in _sorted(folder, "*config.json"))
    own |= any(not module["type"].startswith(OWN_MODULES) for module in _listed(folder))
    files = _sorted(folder, "*.py") if own else []
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def _listed(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    return list(read_json(path)) if path.exists() else []


def _sorted(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file())
