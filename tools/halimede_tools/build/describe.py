"""Describe: a model's folder to a loaded model and its ModelSpec.

sentence-transformers reads the folder in each of its forms: a sentence-transformers folder, a plain
transformers folder (mean pooling, of a causal language model the last token), or a folder with
nothing but ONNX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from halimede_ops import text
from halimede_ops.errors import BuildError, InvalidModel, UntrustedCode
from halimede_ops.spec import (
    CLASSIFIER,
    DENSE,
    LATE_INTERACTION,
    MULTI_VECTOR,
    POOLED_TOKENS,
    RERANKER,
    SPARSE,
    SPARSE_KIND,
    TOKEN_EMBEDDINGS,
    TOKEN_TYPES,
    ImageSpec,
    ModelSpec,
)
from halimede_repository.checksums import sha256
from halimede_tools.build.checks import space, spans
from halimede_tools.build.keys import key_of
from halimede_tools.build.kinds import (
    activation,
    chat,
    contents,
    late,
    loaded,
    sparse,
    static,
)
from halimede_tools.build.kinds.files import read_json
from halimede_tools.build.kinds.recognise import module_names, recognise
from halimede_tools.build.vision import processor, two_towers

KNOWN_MODULES = (
    "Transformer", "StaticEmbedding", "CLIPModel", "Pooling", "Dense", "LayerNorm", "Normalize",
    "Dropout", "MLMTransformer", "SpladePooling", "SparseAutoEncoder", "LogitScore",
)  # fmt: skip
OWN_MODULES = "sentence_transformers."
IGNORED_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of a config that decide nothing of the vectors."""
SPARSE_FILE, MULTI_VECTOR_FILE = "sparse_linear.pt", "colbert_linear.pt"
MAX_TOKENS = 8192
"""Default for the highest token limit: attention's memory grows with its square."""


class ModelOptions(NamedTuple):
    """What the user may decide about a model, besides its folder."""

    name: str
    """Name the model is served under."""
    trust_remote_code: bool = False
    """Whether Python code in the folder may run."""
    max_tokens: int | None = None
    """A lower or higher token limit than the model's own or MAX_TOKENS."""
    prompts: Mapping[str, str] = {}
    """Prompts by input type, for a folder that has none."""
    matryoshka: tuple[int, ...] = ()
    layer_norm_before_cut: bool = False
    token_embeddings: bool = False
    """Whether the last hidden state becomes an output."""
    late_chunking: bool = False
    """Whether the model takes SPANS of a text."""
    space: str | None = None
    """Space of a model that shares it with another. None: the fingerprint of its folder."""
    kind: str | None = None
    """Kind of the model, one of `halimede_ops.spec.KINDS`. None: as its folder says."""


def load(folder: Path, options: ModelOptions) -> Any:
    """The model in `folder` on the CPU, its token limit set: a SentenceTransformer, a CrossEncoder
    for a model that gives scores, a SparseEncoder, or a LateModel.

    Raises:
        InvalidModel: the folder is no model, is damaged, or has a module that is not supported.
        UntrustedCode: it carries Python code and `options` does not trust it.
    """
    check_modules(folder, options.name)
    check_trusted(folder, options)
    if static.is_static(folder):
        with quiet():
            model = static.load(folder, options.name)
        own = static.own_limit(model)
        _check_limit(options, own)
        static.limit(model, options.max_tokens or own)
        return model
    two_towers.prepare(folder, options.name)
    model = open_model(folder, options)
    _check_tokenizer(model.tokenizer, options.name)
    loaded.prepare(model, options.name)
    model.max_seq_length = _max_tokens(model, folder, options)
    if two_towers.pads_texts(model):
        two_towers.pad_to_limit(model, options.name)
    return model


def open_model(folder: Path, options: ModelOptions) -> Any:
    """The model in `folder` as its library opens it.

    Raises:
        InvalidModel: the folder is damaged.
    """
    kind = recognise(folder, options.name, options.kind)
    sparse.check_folder(folder, module_names(folder), options.name, kind)
    backend = "torch" if contents.has_torch_weights(folder) else "onnx"
    try:
        with (
            quiet(),
            contents.without_links(folder) as linked,
            two_towers.completed(linked) as complete,
        ):
            return _opened(complete, kind, backend, options)
    except InvalidModel:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise contents.explain(error, folder, options.name) from error


def _opened(folder: Path, kind: str, backend: str, options: ModelOptions) -> Any:
    trust, model_options = options.trust_remote_code, _model_options(folder, options.name, backend)
    if kind == LATE_INTERACTION:
        late.check_weights(folder, options.name)
        return late.load(folder, options.name, trust_remote_code=trust, model_options=model_options)
    return library(kind)(
        str(folder),
        device="cpu",
        local_files_only=True,
        trust_remote_code=trust,
        backend=backend,
        model_kwargs=model_options,
        **sparse.load_options(folder, kind),
    )


def library(kind: str) -> Any:
    """The class of sentence-transformers that is the reference for a kind of model."""
    import sentence_transformers

    if kind in (RERANKER, CLASSIFIER):
        return sentence_transformers.CrossEncoder
    if kind == SPARSE_KIND:
        return sentence_transformers.SparseEncoder
    return sentence_transformers.SentenceTransformer


def describe(model: Any, folder: Path, options: ModelOptions) -> ModelSpec:
    """The ModelSpec of a loaded model.

    Raises:
        InvalidModel: it has no form that is supported, or none that `options` ask for.
    """
    if options.late_chunking:
        _check_spans(model, folder, options)
    if static.is_static(folder):
        return _describe_static(model, folder, options)
    if hasattr(model, "late"):
        return _describe_late(model, folder, options)
    own = {name: prompt for name, prompt in model.prompts.items() if prompt}
    prompts = input_types(own or options.prompts, model.default_prompt_name)
    modules = list(model)
    kind = recognise(folder, options.name, options.kind)
    scores = score_facts(model, options.name, kind)
    weighted = sparse.facts(model, options.name, kind)
    fields: dict[str, Any] = {
        "dims": len(scores["labels"]) or 1 if scores else int(model.get_embedding_dimension()),
        "max_tokens": int(model.max_seq_length),
        # CLIP and SigLIP compare by cosine: their models normalise the vectors of both towers.
        "normalised": two_towers.has_two_towers(model) or type(modules[-1]).__name__ == "Normalize",
        "prompts": prompts,
        "default_input_type": model.default_prompt_name,
        "heads": {} if scores or weighted else heads(model, folder, options),
        "layer_norm_before_cut": options.layer_norm_before_cut,
    } | weighted
    image = None if scores else image_spec(model, folder, options.name)
    if not scores and loaded.needs_token_types(model):
        fields["token_types"] = True
    if (getattr(model.tokenizer, "init_kwargs", None) or {}).get("split_special_tokens"):
        fields["splits_special_tokens"] = True
    decides = fields | scores
    if scores:
        decides["activation"] = str(activation.activation(model, folder, kind))
    if weighted:
        decides[sparse.MAX_ACTIVE_DIMS] = model.max_active_dims
    return ModelSpec(
        name=options.name,
        space=options.space or _space(model, folder, decides, image),
        image=image,
        special_ids=_special_ids(model.tokenizer) if fields["heads"] else (),
        matryoshka=options.matryoshka,
        length_buckets=length_buckets(fields["max_tokens"]),
        **fields | scores,
    )


def _describe_static(model: Any, folder: Path, options: ModelOptions) -> ModelSpec:
    own = {name: prompt for name, prompt in model.prompts.items() if prompt}
    fields: dict[str, Any] = {
        "dims": int(model.get_embedding_dimension()),
        "max_tokens": static.own_limit(model),
        "normalised": type(list(model)[-1]).__name__ == "Normalize",
        "prompts": input_types(own or options.prompts, model.default_prompt_name),
        "default_input_type": model.default_prompt_name,
        "layer_norm_before_cut": options.layer_norm_before_cut,
        "static": True,
    }
    return ModelSpec(
        name=options.name,
        space=options.space or _space(model, folder, fields, None),
        matryoshka=options.matryoshka,
        length_buckets=length_buckets(fields["max_tokens"]),
        **fields,
    )


def _describe_late(model: Any, folder: Path, options: ModelOptions) -> ModelSpec:
    own = {name: prompt for name, prompt in model.prompts.items() if prompt}
    late_spec = late.late_spec(model, options.name, position_limit(model))
    fields: dict[str, Any] = {
        "kind": LATE_INTERACTION,
        "dims": int(model.get_embedding_dimension()),
        "max_tokens": max(late_spec.query_tokens, late_spec.document_tokens),
        "normalised": True,
        "prompts": input_types(own or options.prompts, model.default_prompt_name),
        "default_input_type": model.default_prompt_name,
        "heads": {MULTI_VECTOR: int(model.get_embedding_dimension())},
    }
    decides = fields | {"late": dataclasses.asdict(late_spec)}
    return ModelSpec(
        name=options.name,
        space=_space(model, folder, decides, None),
        length_buckets=length_buckets(fields["max_tokens"]),
        late=late_spec,
        **fields,
    )


def space_of(folder: Path, options: ModelOptions) -> str:
    """The space that the model in a folder has alone."""
    return describe(load(folder, options), folder, options).space


def score_facts(model: Any, name: str, kind: str) -> dict[str, Any]:
    """The fields of a ModelSpec that a reranker or a classifier has besides; none for others."""
    if kind not in (RERANKER, CLASSIFIER):
        return {}
    config = model[0].auto_model.config
    names = getattr(model.tokenizer, "model_input_names", ())
    facts = chat.facts(model, name)
    return facts | {
        "kind": kind,
        "labels": tuple(config.id2label.values()) if kind == CLASSIFIER else (),
        "token_types": TOKEN_TYPES in names and getattr(config, "type_vocab_size", 0) > 1,
    }


def check_modules(folder: Path, name: str) -> None:
    """Raise unless every module of the folder can be exported.

    Raises:
        InvalidModel: the folder is not there, or one of its modules is not supported.
    """
    contents.check(folder, name)
    for module in _modules(folder):
        kind = module["type"].rsplit(".", 1)[-1]
        # check_trusted judges modules of the folder's own code.
        if module["type"].startswith(OWN_MODULES) and kind not in KNOWN_MODULES:
            raise InvalidModel(
                f"{name} has a module {kind}; supported are {', '.join(KNOWN_MODULES)}."
            )
    for path in sorted(folder.glob("*Pooling/config.json")):
        if not read_json(path).get("include_prompt", True):
            raise InvalidModel(
                f"{name} pools without its prompt (include_prompt: false), which is not supported."
            )


def check_trusted(folder: Path, options: ModelOptions) -> None:
    """Raise if building the folder runs code of its own that is not trusted.

    Raises:
        UntrustedCode: the folder's configs name Python code to run.
    """
    activation.check_trusted(folder, options.name, options.trust_remote_code)
    configs = [path for path in folder.rglob("*config.json") if path.is_file()]
    named = any("auto_map" in read_json(path) for path in configs)
    known = (OWN_MODULES, *late.DENSE_MODULES)
    named |= any(not module["type"].startswith(known) for module in _modules(folder))
    if named and not options.trust_remote_code:
        raise UntrustedCode(
            f"{options.name} carries Python code of its own. Building runs it with your rights: "
            "read it, then pass --trust-remote-code. What is served runs none of it."
        )


def heads(model: Any, folder: Path, options: ModelOptions) -> dict[str, int]:
    """The model's outputs with one row per token: name → width of a row."""
    found: dict[str, int] = {}
    if (folder / SPARSE_FILE).exists():
        found[SPARSE] = 1
    if (folder / MULTI_VECTOR_FILE).exists():
        found[MULTI_VECTOR] = head_weights(folder / MULTI_VECTOR_FILE)["weight"].shape[0]
    if options.token_embeddings:
        found[TOKEN_EMBEDDINGS] = int(model[0].get_embedding_dimension())
    if options.late_chunking:
        found[POOLED_TOKENS] = int(model.get_embedding_dimension())
    return found


def _check_spans(model: Any, folder: Path, options: ModelOptions) -> None:
    if static.is_static(folder):
        raise spans.unsupported(options.name, "has no context: it embeds each token alone")
    kind = recognise(folder, options.name, options.kind)
    if kind != DENSE:
        raise spans.unsupported(options.name, f"is a {kind.replace('_', '-')} model")
    if two_towers.has_two_towers(model):
        raise spans.unsupported(options.name, "has a tower for images, and takes short texts")
    spans.layers(model, options.name)


def head_weights(path: Path) -> dict[str, Any]:
    """Weight and bias of a head's linear layer. Only tensors are unpickled, never code.

    Raises:
        InvalidModel: the file is damaged.
    """
    import torch

    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise InvalidModel(f"{path.name} of the model cannot be read; fetch it again") from error


def image_spec(model: Any, folder: Path, name: str) -> ImageSpec | None:
    """The input of the model's vision tower; None without such a tower.

    Raises:
        InvalidModel: the preprocessing is not supported, or does not fit the tower.
    """
    if not two_towers.has_two_towers(model):
        return None
    config = model[0].auto_model.config
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    classes = 0 if config.model_type == two_towers.SIGLIP else 1
    prepared = processor.image_processor(folder, name, config)
    image = processor.image_spec(prepared, name, positions=patches + classes)
    if (image.height, image.width) != (vision.image_size, vision.image_size):
        raise InvalidModel(
            f"{name}: its image processor gives {image.width} x {image.height} pixels; the vision "
            f"tower takes {vision.image_size} x {vision.image_size}."
        )
    return image


def input_types(prompts: Mapping[str, str], default: str | None) -> dict[str, str]:
    """Input type → prompt, with `query` and `document` for every model.

    `document` is the first of document, passage and corpus that is not empty: sentence-transformers
    5 writes an empty `document` into every folder.
    """
    plain = prompts.get(default, "") if default else ""
    documents = (prompts.get(name) for name in ("document", "passage", "corpus"))
    return {
        **({} if default is None else {default: plain}),
        **prompts,
        "query": prompts.get("query") or plain,
        "document": next((prompt for prompt in documents if prompt), plain),
    }


def length_buckets(max_tokens: int) -> tuple[int, ...]:
    """Powers of two from 16 below `max_tokens`, then `max_tokens`."""
    buckets = [16]
    while buckets[-1] * 2 < max_tokens:
        buckets.append(buckets[-1] * 2)
    return (*[size for size in buckets if size < max_tokens], max_tokens)


def needed_bytes(folder: Path) -> int:
    """Memory that a build of the folder's model needs: about three times its float32 weights."""
    files = contents.loaded_weights(folder) or folder.rglob("*.onnx*")
    sizes = [path.stat().st_size for path in files]
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    halved = "16" in str(config.get("dtype") or config.get("torch_dtype") or "")
    return 3 * sum(sizes) * (2 if halved else 1)


def check_memory(folder: Path, name: str, limit_bytes: int) -> None:
    """Raise unless the model can be built within `limit_bytes` of memory.

    Raises:
        BuildError: it needs more.
    """
    needed = needed_bytes(folder)
    if needed > limit_bytes:
        raise BuildError(
            f"building {name} takes about {needed / 2**30:.1f} GiB of memory; "
            f"the limit is {limit_bytes / 2**30:.1f} GiB. "
            "Build on a larger machine, or raise HALIMEDE_MEMORY_LIMIT_GIB."
        )


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise unless the tokenizer is a fast one; set its padding token if it has none. Any token
    will do: the attention mask hides padding.
    """
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise InvalidModel(f"{name} has no tokenizer that can be saved as tokenizer.json.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise InvalidModel(
            f"{name}'s tokenizer has no padding token nor any that could stand for it. "
            "Set pad_token in its tokenizer_config.json."
        )


def _model_options(folder: Path, name: str, backend: str) -> dict[str, Any]:
    if backend == "torch":
        import torch

        return {"dtype": torch.float32, "attn_implementation": "eager"}
    return {
        "file_name": str(contents.onnx_file(folder, name).relative_to(folder)),
        "provider": "CPUExecutionProvider",
    }


def _max_tokens(model: Any, folder: Path, options: ModelOptions) -> int:
    most = position_limit(model)
    named = contents.text_limit(folder, options.name) or model.max_seq_length or MAX_TOKENS
    own = min(int(named) if named > 0 else MAX_TOKENS, most)
    # The length of documents is a choice of whoever saved a late-interaction model.
    _check_limit(options, most if hasattr(model, "late") else own)
    return options.max_tokens or min(own, MAX_TOKENS)


def _check_limit(options: ModelOptions, own: int) -> None:
    """Raise unless the user's token limit is within the model's own."""
    if options.max_tokens is not None and not 1 <= options.max_tokens <= own:
        raise InvalidModel(
            f"max_tokens is {options.max_tokens}; {options.name} takes 1 to {own} tokens."
        )


def transformer_config(model: Any) -> dict[str, Any]:
    """The config of a loaded model's transformer; empty for a static model."""
    transformer = getattr(model[0], "auto_model", None)
    return {} if transformer is None else dict(transformer.config.to_dict())


def token_counter(model: Any) -> Callable[[str], int]:
    """A function that counts the tokens of a whole text, special tokens and a document's marker
    included.
    """
    if hasattr(model[0], "auto_model"):
        markers = 1 if hasattr(model, "late") and model.late.document_marker else 0
        return lambda text: len(model.tokenizer(text, verbose=False)["input_ids"]) + markers
    return static.counter(model)


def position_limit(model: Any) -> int:
    """Number of tokens that the model has positions for. RoBERTa's family counts positions from
    padding_idx + 1, so its table of 514 positions holds 512 tokens.
    """
    config = getattr(model[0].auto_model, "config", None)
    config = getattr(config, "text_config", config)
    table = int(getattr(config, "max_position_embeddings", 0) or 0)
    if table <= 0:  # XLNet says -1: it has no limit
        return 10**9
    children = model[0].auto_model.modules() if hasattr(model[0].auto_model, "modules") else ()
    for module in children:
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and hasattr(module, "position_embeddings"):
            return table - padding - 1
    return table


def _space(model: Any, folder: Path, fields: dict[str, Any], image: ImageSpec | None) -> str:
    """Fingerprint of everything that decides a vector: equal spaces give comparable vectors.

    It is taken from the folder's own files, so another version of a tool does not change it.
    """
    graph = None
    if not contents.has_torch_weights(folder):
        graph = contents.onnx_file(folder, "the model")
    files = [*contents.weights(folder), *([graph] if graph else [])]
    files += sorted(folder.glob("*_linear.pt"))
    configs = {
        str(path.relative_to(folder)): {
            key: value for key, value in read_json(path).items() if key not in IGNORED_KEYS
        }
        for path in sorted([*folder.glob("config.json"), *folder.glob("*/config.json")])
    }
    decides = {
        "weights": [sha256(path) for path in files],
        "tokenizer": _tokenizer_digest(model, folder),
        "modules": [type(module).__name__ for module in model],
        "configs": configs,
        **{key: value for key, value in fields.items() if key != "heads"},
    }
    if image is not None:
        decides["image"] = image.decides()
    decides |= space.further(model, folder, graph)
    return key_of(json.dumps(decides, sort_keys=True))


def _tokenizer_digest(model: Any, folder: Path) -> str:
    files = sorted(folder.rglob(text.FILE_NAME))
    if files:
        return sha256(files[0])
    return hashlib.sha256(tokenizer_json(model).encode()).hexdigest()


def tokenizer_json(model: Any) -> str:
    """The text of tokenizer.json, with the model's token limit and side of truncation."""
    from tokenizers import Tokenizer

    if isinstance(model.tokenizer, Tokenizer):  # a static model's
        return static.tokenizer_json(model)
    fields = json.loads(model.tokenizer.backend_tokenizer.to_str())
    if chat.has_template(model):  # its template has the special tokens
        fields["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.no_padding()
    tokenizer.enable_truncation(model.max_seq_length, direction=model.tokenizer.truncation_side)
    return str(tokenizer.to_str(pretty=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' notices and the tracer's warnings, which do not concern this model."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _special_ids(tokenizer: Any) -> tuple[int, ...]:
    names = ("cls", "bos", "eos", "sep", "pad", "unk")
    ids = {getattr(tokenizer, f"{name}_token_id", None) for name in names}
    return tuple(sorted(token for token in ids if token is not None))


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    return list(read_json(path)) if path.exists() else []
