"""Late interaction: models that give a vector for each token, in the two forms they are published.

- A ColBERT checkpoint is a transformers folder with `linear.weight` beside the weights of the
  transformer, and with its settings in `artifact.metadata`.
- PyLate's folder is one of sentence-transformers whose Dense modules project each token, with its
  settings in `config_sentence_transformers.json`.

Both put a marker behind a text's first token, fill up queries with the mask token, and leave the
vectors of punctuation out of documents (Khattab and Zaharia 2020, arXiv:2004.12832).
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halimede_ops.errors import InvalidModel
from halimede_ops.spec import LATE_INTERACTION, QUERY, LateSpec, ModelSpec
from halimede_ops.text import Query
from halimede_tools.build.kinds import recognise
from halimede_tools.build.kinds.files import read_json

COLBERT_DEFAULTS = {
    "query_maxlen": 32, "doc_maxlen": 220, "query_token_id": "[unused0]",
    "doc_token_id": "[unused1]", "mask_punctuation": True, "attend_to_mask_tokens": False,
}  # fmt: skip
"""Settings of a checkpoint whose metadata does not name them, as ColBERT's own code has them."""
PYLATE_DEFAULTS = {
    "query_length": 32, "document_length": 180, "query_prefix": "[Q] ", "document_prefix": "[D] ",
    "skiplist_words": list(string.punctuation), "do_query_expansion": True,
    "attend_to_expansion_tokens": False, "prompts": {}, "default_prompt_name": None,
}  # fmt: skip
"""The same for a folder of PyLate."""
DENSE_MODULES = ("pylate.models.Dense.Dense", "pylate.models.dense.Dense")
"""PyLate's own classes in modules.json: the build knows them, and runs none of their code."""
LINEAR = "linear.weight"


class LateSettings(NamedTuple):
    """What a folder says of its queries and documents."""

    query_tokens: int
    document_tokens: int
    query_marker: str
    document_marker: str
    expands_queries: bool
    attends_to_expansion: bool
    skipped_words: Sequence[str]
    is_checkpoint: bool
    """Whether the folder is a ColBERT checkpoint, not one of PyLate."""
    prompts: Mapping[str, str] = {}
    default_prompt: str | None = None


def load(folder: Path, name: str, *, trust_remote_code: bool, model_options: Any) -> Any:
    """The model in `folder` on the CPU, as a LateModel. Its projections are read from the folder's
    weights; no code of PyLate or of ColBERT runs.

    Raises:
        InvalidModel: it has no projection, or one that is not supported.
    """
    from sentence_transformers.sentence_transformer.modules import Transformer

    from halimede_tools.build.graph import late

    modules = _modules(folder)
    projections = list(_projections(folder, modules, name))
    place = modules[0].get("path", "") if modules else ""
    transformer = Transformer.load(
        str(folder),
        subfolder=place,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        model_kwargs=model_options,
    )
    found = settings(folder)
    if found.expands_queries and transformer.tokenizer.padding_side == "left":
        raise InvalidModel(
            f"{name} pads its queries on the left, which is not supported for a {LATE_INTERACTION} "
            "model."
        )
    return late.LateModel(transformer, projections, found).eval()


def check_weights(folder: Path, name: str) -> None:
    """Raise unless the folder has weights for PyTorch.

    Raises:
        InvalidModel: it has none.
    """
    if not [*folder.rglob("*.safetensors"), *folder.rglob("pytorch_model*.bin")]:
        raise InvalidModel(
            f"{name} has no weights for PyTorch. A {LATE_INTERACTION} model is built from these "
            "alone, not from a ready-made ONNX file."
        )


def settings(folder: Path) -> LateSettings:
    """The settings that the folder names, and the defaults of the others.

    Raises:
        InvalidModel: a file of settings is damaged.
    """
    if not (folder / "modules.json").exists():
        path = folder / recognise.COLBERT_FILE
        found = COLBERT_DEFAULTS | (read_json(path) if path.exists() else {})
        return LateSettings(
            query_tokens=int(found["query_maxlen"]),
            document_tokens=int(found["doc_maxlen"]),
            query_marker=found["query_token_id"],
            document_marker=found["doc_token_id"],
            expands_queries=True,
            attends_to_expansion=bool(found["attend_to_mask_tokens"]),
            skipped_words=tuple(string.punctuation) if found["mask_punctuation"] else (),
            is_checkpoint=True,
        )
    path = folder / recognise.SENTENCE_TRANSFORMERS
    given = read_json(path) if path.exists() else {}
    found = PYLATE_DEFAULTS | {key: value for key, value in given.items() if value is not None}
    expands = bool(found["do_query_expansion"])
    return LateSettings(
        query_tokens=int(found["query_length"]),
        document_tokens=int(found["document_length"]),
        query_marker=found["query_prefix"],
        document_marker=found["document_prefix"],
        expands_queries=expands,
        attends_to_expansion=expands and bool(found["attend_to_expansion_tokens"]),
        skipped_words=tuple(found["skiplist_words"]),
        is_checkpoint=False,
        prompts=found["prompts"],
        default_prompt=found["default_prompt_name"],
    )


def late_spec(model: Any, name: str, most_tokens: int) -> LateSpec:
    """How a loaded LateModel reads its texts; it has positions for `most_tokens`.

    Raises:
        InvalidModel: a marker is no token of its vocabulary, or no token can fill up a query.
    """
    found, tokenizer = model.late, model.tokenizer
    expansion = next(
        (
            token
            for token in (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
            if token is not None
        ),
        None,
    )
    skipped = _skipped_ids(tokenizer, found)
    return LateSpec(
        query_tokens=min(found.query_tokens, most_tokens),
        document_tokens=int(model.max_seq_length),
        query_marker=_marker(tokenizer, found.query_marker, name),
        document_marker=_marker(tokenizer, found.document_marker, name),
        expansion=expansion if found.expands_queries else None,
        attends_to_expansion=found.attends_to_expansion,
        skipped_ids=tuple(sorted(skipped)),
        padding_id=tokenizer.pad_token_id if found.is_checkpoint else None,
    )


def reference(
    model: Any, facts: ModelSpec, inputs: Sequence[Any], batch_size: int = 32
) -> np.ndarray:
    """The vectors of all inputs, one input after another, by the definition of ColBERT and PyLate:
    `[vectors, dims]` float32. Texts are padded to one length, and all that has no vector is taken
    out at the end.
    """
    assert facts.late is not None
    rows: dict[int, np.ndarray] = {}
    for is_query in (True, False):
        chosen = [row for row, item in enumerate(inputs) if isinstance(item, Query) is is_query]
        prompt = facts.prompt(QUERY if is_query else "document")
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            texts = [prompt + _string(inputs[row]) for row in batch]
            found = _batch_reference(model, facts.late, texts, is_query=is_query)
            rows |= zip(batch, found, strict=True)
    return np.concatenate([rows[row] for row in range(len(inputs))]).astype(np.float32)


def _batch_reference(
    model: Any, late: LateSpec, texts: list[str], *, is_query: bool
) -> list[np.ndarray]:
    import torch

    marker = late.query_marker if is_query else late.document_marker
    limit = (late.query_tokens if is_query else late.document_tokens) - (marker is not None)
    fills = is_query and late.expansion is not None
    encoded = model.tokenizer(
        texts,
        truncation=True,
        max_length=limit,
        padding="max_length" if fills else True,
        return_tensors="pt",
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    if marker is not None:
        ids, mask = _inserted(ids, marker), _inserted(mask, 1)
    kept = mask.bool()
    if fills:
        ids[(mask == 0) | (ids == (-1 if late.padding_id is None else late.padding_id))] = (
            late.expansion
        )
        kept = torch.ones_like(kept)
        mask = torch.ones_like(mask) if late.attends_to_expansion else mask
    elif not is_query:
        kept = kept & ~torch.isin(ids, torch.tensor(late.skipped_ids, dtype=ids.dtype))
    with torch.no_grad():
        hidden = model[0].auto_model(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors = model.project(hidden).numpy()
    return [vectors[row][kept[row].numpy()] for row in range(len(texts))]


def _inserted(values: Any, value: int) -> Any:
    import torch

    return torch.cat([values[:, :1], torch.full_like(values[:, :1], value), values[:, 1:]], dim=1)


def _string(item: Any) -> str:
    return str(item.text if isinstance(item, Query) else item)


def _marker(tokenizer: Any, marker: str, name: str) -> int | None:
    if not marker:
        return None
    token = tokenizer.convert_tokens_to_ids(marker)
    if token is None or (token == tokenizer.unk_token_id and marker != tokenizer.unk_token):
        raise InvalidModel(
            f"{name} marks its texts with {marker!r}, which is no token of its tokenizer. Save the "
            "model again with the tokenizer that it was trained with."
        )
    return int(token)


def _skipped_ids(tokenizer: Any, found: LateSettings) -> set[int]:
    """As ColBERT takes them for its checkpoints, with padding, and PyLate for its folders."""
    if found.is_checkpoint:
        words = (
            tokenizer.encode(word, add_special_tokens=False)[:1] for word in found.skipped_words
        )
        padding = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
        return {*padding, *(token for ids in words for token in ids)}
    tokens = map(tokenizer.convert_tokens_to_ids, found.skipped_words)
    return {int(token) for token in tokens if token is not None}


def _projections(folder: Path, modules: list[dict[str, Any]], name: str) -> Iterator[Any]:
    if not modules:
        yield _of_checkpoint(folder, name)
        return
    dense = [module for module in modules if str(module["type"]).endswith("Dense")]
    if not dense:
        raise _without_projection(name, "no Dense module")
    for module in dense:
        yield _of_dense(folder / module["path"], name)


def _of_checkpoint(folder: Path, name: str) -> Any:
    import torch

    from halimede_tools.build.graph import late

    for path in _weights(folder):
        tensors = _tensors(path)
        if LINEAR in tensors:
            _check_width(folder, tensors[LINEAR].shape[0], name)
            bias = tensors.get("linear.bias")
            return late.Projection(tensors[LINEAR], bias, torch.nn.Identity())
    raise _without_projection(name, f"no tensor {LINEAR}")


def _check_width(folder: Path, width: int, name: str) -> None:
    path = folder / recognise.COLBERT_FILE
    named = read_json(path).get("dim") if path.exists() else None
    if named not in (None, width):
        raise InvalidModel(
            f"{name}: {recognise.COLBERT_FILE} names vectors of {named} dimensions; {LINEAR} gives "
            f"{width}. Fetch the folder again."
        )


def _of_dense(folder: Path, name: str) -> Any:
    from halimede_tools.build.graph import late

    config = read_json(folder / "config.json")
    tensors = {key: value for path in _weights(folder) for key, value in _tensors(path).items()}
    if LINEAR not in tensors:
        raise _without_projection(name, f"no tensor {LINEAR} in its Dense module")
    return late.Projection(
        tensors[LINEAR],
        tensors.get("linear.bias"),
        _activation(str(config.get("activation_function") or ""), name),
        tensors.get("residual.weight"),
        adds_input=bool(config.get("use_residual")),
    )


def _activation(path: str, name: str) -> Any:
    import torch

    class_name = path.rsplit(".", 1)[-1] or "Identity"
    if (path and not path.startswith("torch.nn.")) or not hasattr(torch.nn, class_name):
        raise InvalidModel(
            f"{name} has a Dense module with the activation {class_name}, which is not one of "
            "torch.nn: it is not supported."
        )
    return getattr(torch.nn, class_name)()


def _without_projection(name: str, what: str) -> InvalidModel:
    return InvalidModel(
        f"{name} has {what}: a {LATE_INTERACTION} model projects the hidden state of each token. "
        "If it embeds a text with one vector, pass --kind dense."
    )


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _tensors(path: Path) -> Mapping[str, Any]:
    """The tensors of a file of weights. Only tensors are unpickled, never code."""
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # both libraries raise their own
        raise InvalidModel(f"{path.name} of the model cannot be read; fetch it again") from error


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    return list(read_json(path)) if path.exists() else []
