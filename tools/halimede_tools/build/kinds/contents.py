"""Contents: what a model's folder lacks or has too much of, found before a library opens it.

"Damaged" is said of damage alone. Everything else is refused with what was found and what to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from halimede_ops.errors import InvalidModel
from halimede_tools.build.kinds.files import read_json

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
ADAPTER = "adapter_config.json"
OTHER_WEIGHTS = {
    "tf_model*.h5": ("TensorFlow", "from_tf=True"),
    "model.ckpt*": ("TensorFlow", "from_tf=True"),
    "flax_model*.msgpack": ("Flax", "from_flax=True"),
    "*.gguf": ("GGUF", ""),
    "rust_model.ot": ("Rust", ""),
    "openvino_model*.xml": ("OpenVINO", ""),
}
"""Weights of other frameworks → the framework, and how transformers reads them, if it does."""
FORMATS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Files of PyTorch weights, and the index of those that are split: the first that is there is
loaded."""
LFS_POINTER = b"version https://git-lfs"
"""Begins a file that Git LFS has put in the place of a large one."""
ONNX_NAMES = ("model.onnx", "onnx/model.onnx")
"""Where a folder's FP32 graph is looked for."""
TOKENIZERS = (
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model", "spm.model",
)  # fmt: skip
SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of configs with the number of experts of a mixture."""
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "zamba2", "bamba", "rwkv")
UNTRACEABLE = {
    **dict.fromkeys(
        (*STATE_SPACE, "recurrent_gemma"),
        "it is a state-space model: it reads a text token by token, in a loop as long as the text",
    ),
    "xmod": "it has an adapter for each language, which it chooses by the text's language",
    "funnel": "it shortens a text in steps, and what it gives depends on the text's padding",
    "reformer": "it sorts tokens by hashes that are random for each run",
}
"""Architectures of which no graph can be made → why."""
HONOURED = {"max_length", "padding", "padding_side", "pad_to_multiple_of", "truncation"}
"""Options of sentence-transformers' `processing_kwargs` for texts that a build honours. Padding
decides no vector."""


def check(folder: Path, name: str) -> None:
    """Raise unless the folder has a model's config, readable weights and a tokenizer.

    Raises:
        InvalidModel: it lacks one of them, or one is damaged.
    """
    if not folder.is_dir():
        raise InvalidModel(f"{name}: there is no such folder; give a model's folder.")
    _check_adapter(folder, name)
    if not (folder / "config.json").exists() and not (folder / "modules.json").exists():
        raise InvalidModel(f"{name}: the folder has neither config.json nor modules.json.")
    _check_weights(folder, name)
    _check_architecture(folder, name)


def weights(folder: Path) -> list[Path]:
    """The files of PyTorch weights in a folder, in order of name; none for an ONNX-only one."""
    return sorted(path for pattern in WEIGHTS for path in folder.rglob(pattern))


def loaded_weights(folder: Path) -> list[Path]:
    """The files of weights that are loaded, those that are missing too."""
    loaded = [path for module in module_folders(folder) for path in module_weights(module)]
    return loaded or weights(folder)  # the modules of a Router have folders within folders


def module_weights(folder: Path) -> list[Path]:
    """The files of PyTorch weights that are loaded of one module's folder, those that are missing
    too; none if it has neither weights nor their index.
    """
    for file, index in FORMATS:
        if (folder / file).exists():
            return [folder / file]
        if (folder / index).exists():
            named = set((read_json(folder / index).get("weight_map") or {}).values())
            return [folder / name for name in sorted(named)]
    return []


def module_folders(folder: Path) -> list[Path]:
    """The folders of a model's modules; of a plain folder itself."""
    path = folder / "modules.json"
    modules = read_json(path) if path.exists() else [{"path": ""}]
    return list(dict.fromkeys(folder / str(module["path"]) for module in modules))


def has_torch_weights(folder: Path) -> bool:
    """Whether the transformer has PyTorch weights, and not only a head behind an ONNX graph."""
    is_own = bool(module_weights(module_folders(folder)[0]))
    return is_own or (bool(weights(folder)) and not list(folder.rglob("*.onnx")))


def onnx_file(folder: Path, name: str) -> Path:
    """The FP32 ONNX file of a folder that has one.

    Raises:
        InvalidModel: it has none.
    """
    for candidate in ONNX_NAMES:
        if (folder / candidate).exists():
            return folder / candidate
    raise InvalidModel(f"{name}: {_found(folder)}")


@contextlib.contextmanager
def without_links(folder: Path) -> Iterator[Path]:
    """The folder, or a copy whose files are no symbolic links, as in a cache of Hugging Face's:
    onnxruntime refuses weights that lie in another folder than the graph.
    """
    if has_torch_weights(folder) or not any(path.is_symlink() for path in folder.rglob("*.onnx*")):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "model"
        shutil.copytree(folder, copy)  # it follows links, and onnx refuses hard links too
        yield copy


def explain(error: Exception, folder: Path, name: str) -> InvalidModel:
    """The error to raise where a library cannot open a folder: its cause in plain words."""
    if isinstance(error, InvalidModel):
        return error
    if not any((path / file).exists() for path in module_folders(folder) for file in TOKENIZERS):
        return InvalidModel(f"{name} has no tokenizer: none of {', '.join(TOKENIZERS)} is there.")
    missing = _missing_package(error, folder)
    if missing:
        return InvalidModel(
            f"{name} has a tokenizer that the package {missing} reads, which is not installed. "
            f"Run: pip install {missing}"
        )
    cause = " ".join(str(error).replace(str(folder), "the folder").split())
    return InvalidModel(f"{name} cannot be opened ({type(error).__name__}): {cause[:300]}")


def text_limit(folder: Path, name: str) -> int | None:
    """The token limit in sentence-transformers' `processing_kwargs`; None if they name none.

    Raises:
        InvalidModel: they have an option that changes token ids and that is not supported.
    """
    limit = None
    for path in sorted(folder.rglob("sentence_bert_config.json")):
        given = read_json(path).get("processing_kwargs") or {}
        # Where both name an option, the tokenizer is called with that of `common`.
        options = {**(given.get("text") or {}), **(given.get("common") or {})}
        others = sorted(set(options) - HONOURED)
        if others or options.get("truncation") in (False, "do_not_truncate"):
            raise InvalidModel(
                f"{name} sets processing_kwargs {', '.join(others) or 'truncation: false'} for "
                f"texts; supported are {', '.join(sorted(HONOURED))}."
            )
        limit = options.get("max_length", limit)
    return None if limit is None else int(limit)


def _check_adapter(folder: Path, name: str) -> None:
    for path in (folder / ADAPTER, *(module / ADAPTER for module in module_folders(folder))):
        if path.exists():
            base = read_json(path).get("base_model_name_or_path") or "its base"
            raise InvalidModel(
                f"{name} has a PEFT adapter of {base}. Merge it first: load it with "
                "peft.AutoPeftModel.from_pretrained, call merge_and_unload(), save what it returns "
                "with save_pretrained, and build that folder."
            )


def _check_weights(folder: Path, name: str) -> None:
    loaded = loaded_weights(folder)
    missing = sorted(path.name for path in loaded if not path.exists())
    if missing:
        raise InvalidModel(
            f"{name} is incomplete: it lacks {', '.join(missing)}, which the index of its weights "
            "names. Fetch the folder again."
        )
    for path in loaded:
        _check_readable(path, name)
    if not weights(folder) and not any((folder / file).exists() for file in ONNX_NAMES):
        raise InvalidModel(f"{name}: {_found(folder)}")


def _check_readable(path: Path, name: str) -> None:
    with path.open("rb") as file:
        begins = file.read(len(LFS_POINTER))
    if begins == LFS_POINTER:
        raise InvalidModel(
            f"{name}: {path.name} is a pointer of Git LFS instead of the weights. Run `git lfs "
            "pull` in the folder."
        )
    if not _is_whole(path, begins):
        raise InvalidModel(
            f"{name} is damaged: {path.name}, of {path.stat().st_size:,} bytes, is no whole file "
            "of weights. Fetch the folder again."
        )


def _is_whole(path: Path, begins: bytes) -> bool:
    """Whether a file of weights has a beginning and an end that fit each other."""
    if path.suffix != ".safetensors":
        # PyTorch before 1.6 wrote a plain pickle, whose end only reading finds.
        return zipfile.is_zipfile(path) if begins.startswith(b"PK") else begins[:1] == b"\x80"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as tensors:
            tensors.keys()
    except (SafetensorError, OSError):
        return False
    return True


def _check_architecture(folder: Path, name: str) -> None:
    from transformers import CONFIG_MAPPING, __version__

    for module in module_folders(folder)[:1]:
        path = module / "config.json"
        config = read_json(path) if path.exists() else {}
        kind = config.get("model_type")
        if kind and kind not in CONFIG_MAPPING and "auto_map" not in config and kind != "model2vec":
            raise InvalidModel(
                f"{name} is of the architecture {kind!r}, which transformers {__version__} does "
                "not know, and the folder has no code of its own for it."
            )
        reason = UNTRACEABLE.get(str(kind))
        if any(int(config.get(key) or 0) > 1 for key in EXPERTS) and "auto_map" not in config:
            reason = "it is a mixture of experts: what it computes for a token depends on the text"
        if reason:
            raise InvalidModel(
                f"{name} ({kind}) cannot be traced to a graph, because {reason}. "
                "Build another model."
            )


def _found(folder: Path) -> str:
    """What a folder without PyTorch weights and without model.onnx has instead, and what to do."""
    graphs = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx"))
    if graphs:
        return (
            f"the folder has {', '.join(graphs)}, and neither PyTorch weights nor a model.onnx. "
            "Add the weights, or the FP32 graph under the name model.onnx; a quantised or "
            "optimised graph cannot be built from."
        )
    for pattern, (framework, option) in OTHER_WEIGHTS.items():
        files = sorted(path.name for path in folder.rglob(pattern))
        if files:
            how = (
                f"Convert it: AutoModel.from_pretrained(folder, {option}).save_pretrained(folder)."
                if option
                else "Give the folder with the model's PyTorch weights."
            )
            return f"the folder has {framework} weights alone ({files[0]}). {how}"
    return "the folder has neither PyTorch weights nor a model.onnx."


def _missing_package(error: Exception, folder: Path) -> str:
    """The package that a folder's tokenizer needs and that is not installed; empty if none."""
    forms = {"sentencepiece": SENTENCEPIECE, "tiktoken": ("*.tiktoken",)}
    for package, patterns in forms.items():
        has_form = any(list(folder.rglob(pattern)) for pattern in patterns)
        is_alone = has_form and not list(folder.rglob("tokenizer.json"))
        if is_alone and importlib.util.find_spec(package) is None:
            return package
    return str(getattr(error, "name", "") or "") if isinstance(error, ImportError) else ""
