"""Fusion: one vector for a text and an image, from two models trained apart.

Untrained, the two vectors are concatenated (n numbers) and projected onto `dims` axes. If n ≤ dims,
nothing is lost. Otherwise the axes are random and uniform over all directions, with a fixed seed,
and inner products are kept up to an error of mean 0 and standard deviation
√((n - dims) / (dims (n + 2))), √2 times that for equal vectors: the law of a random projection,
Beta(dims/2, (n - dims)/2).

Fitted, the axes are those that separate pairs best. With z a centred item, S the covariance of what
differs within pairs and B that of what pairs share, the axes v solve B v = γ S v; each is scaled to
unit noise and weighted by √(γ / (1 + γ)), the Wiener filter's share of signal in it. That is the
two-covariance model (Ioffe's probabilistic LDA, 2006) in closed form; S is shrunk towards a
multiple of the identity, by as much as retrieves best on a part of the training pairs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halimede.config.folders import reason
from halimede_engine import session
from halimede_ops import spec, vectors
from halimede_ops.errors import InvalidInput, QualityError
from halimede_ops.fusion import ARRAYS, Fusion
from halimede_ops.lines import read_lines
from halimede_ops.spec import ModelSpec
from halimede_repository import configs, names
from halimede_tools.build import model_config, repository, towers
from halimede_tools.build.checks.arguments import check_writable
from halimede_tools.build.keys import key_of
from halimede_tools.console import console

DIMS = 768
HALF = 0.5**0.5
SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 0.6, 0.9)
"""Values of the shrinkage that are tried: the share of the identity in S."""
LEAST_NOISE = 1e-9
"""Smallest noise variance, for pairs that do not differ at all."""
VALIDATION_SHARE = 0.25
"""Share of the training pairs that chooses the shrinkage; the final fit uses all of them."""
LEAST_PAIRS = 20
HELD_OUT_SHARE = 0.2
"""Share of the pairs that is kept out of the fit, to measure retrieval."""
UNTRAINED = "untrained: an orthonormal projection; fit it to your pairs with `tools fusion fit`"


class Items(NamedTuple):
    """Texts and images that belong together, as vectors of their models."""

    text: np.ndarray
    """`[n, text dims]` float32, L2 norm 1."""
    image: np.ndarray
    """`[n, image dims]` float32, L2 norm 1."""

    def part(self, rows: Sequence[int] | np.ndarray) -> Items:
        """The items at these places."""
        return Items(self.text[rows], self.image[rows])


class Pairs(NamedTuple):
    """Two views of each identity: row i of one belongs to row i of the other."""

    first: Items
    second: Items

    def part(self, rows: Sequence[int] | np.ndarray) -> Pairs:
        """The pairs at these places."""
        return Pairs(self.first.part(rows), self.second.part(rows))

    def __len__(self) -> int:
        return len(self.first.text)


def untrained(
    text_model: str,
    image_model: str,
    text_dims: int,
    image_dims: int,
    dims: int = DIMS,
    text_weight: float = 0.5,
) -> Fusion:
    """The fusion whose similarity is text_weight × the texts' + (1 − text_weight) × the images'."""
    if not 0 < text_weight < 1:
        raise InvalidInput(f"text_weight is {text_weight}; give more than 0 and less than 1.")
    axes = _axes(text_dims + image_dims, dims)
    return Fusion(
        text_model,
        image_model,
        text_mean=np.zeros(text_dims, np.float32),
        image_mean=np.zeros(image_dims, np.float32),
        text_projection=axes[:text_dims] * np.float32(text_weight**0.5),
        image_projection=axes[text_dims:] * np.float32((1 - text_weight) ** 0.5),
    )


def _axes(inputs: int, dims: int) -> np.ndarray:
    """`[inputs, dims]` float32 with orthonormal rows or columns, the same on every machine."""
    gauss = np.random.default_rng(0).standard_normal((max(inputs, dims), min(inputs, dims)))
    orthonormal, triangle = np.linalg.qr(gauss)
    orthonormal *= np.sign(np.diag(triangle))  # evenly over all directions (Mezzadri, 2007)
    return np.ascontiguousarray(orthonormal if inputs > dims else orthonormal.T, np.float32)


def fit(text_model: str, image_model: str, pairs: Pairs, dims: int = DIMS) -> Fusion:
    """The fusion whose axes separate these pairs best.

    Raises:
        InvalidInput: there are too few pairs.
    """
    _check_enough(len(pairs))
    order = np.random.default_rng(1).permutation(len(pairs))
    held = max(1, int(len(pairs) * VALIDATION_SHARE))
    validation, training = pairs.part(order[:held]), pairs.part(order[held:])

    def mean_rank(shrinkage: float) -> float:
        fusion = _fitted(text_model, image_model, training, dims, shrinkage)
        return retrieval(validation, fusion)["mrr"]

    best = max(SHRINKAGES, key=mean_rank)
    return _fitted(text_model, image_model, pairs, dims, best)


def _check_enough(pairs: int) -> None:
    if pairs < LEAST_PAIRS:
        raise InvalidInput(f"{pairs} pairs are too few to train on; give {LEAST_PAIRS}.")


def _fitted(text_model: str, image_model: str, pairs: Pairs, dims: int, shrinkage: float) -> Fusion:
    first, second = (_side_by_side(items) for items in pairs)
    mean = (first.mean(axis=0) + second.mean(axis=0)) / 2
    first, second = first - mean, second - mean
    noise = _covariance(first - second, first - second) / 2
    shared = _covariance(first, second)
    level = max(np.trace(noise) / len(noise), LEAST_NOISE)
    noise = (1 - shrinkage) * noise + shrinkage * level * np.eye(len(noise))
    # B v = γ S v by S's square root: whiten the noise, then the axes of what is shared.
    values, axes = np.linalg.eigh(noise)
    whiten = axes / np.sqrt(values)
    gains, turned = np.linalg.eigh(whiten.T @ (shared + shared.T) / 2 @ whiten)
    chosen = np.argsort(gains)[::-1][:dims]
    gains = np.maximum(gains[chosen], 0)
    projection = np.zeros((len(mean), dims), np.float32)
    projection[:, : len(chosen)] = whiten @ turned[:, chosen] * np.sqrt(gains / (1 + gains))
    split = pairs.first.text.shape[1]
    return Fusion(
        text_model,
        image_model,
        text_mean=(mean[:split] / HALF).astype(np.float32),
        image_mean=(mean[split:] / HALF).astype(np.float32),
        text_projection=projection[:split] * np.float32(HALF),
        image_projection=projection[split:] * np.float32(HALF),
    )


def _side_by_side(items: Items) -> np.ndarray:
    return np.concatenate([items.text, items.image], axis=1).astype(np.float64) * HALF


def _covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.T @ b / len(a)


def fused(items: Items, fusion: Fusion) -> np.ndarray:
    """Fused vectors `[n, fusion.dims]` float32, L2 norm 1."""
    return vectors.normalise(vectors.fuse(items.text, items.image, fusion))


def retrieval(pairs: Pairs, fusion: Fusion) -> dict[str, float]:
    """How well each first item finds its second among all: recall at 1, mean reciprocal rank."""
    return _retrieval(fused(pairs.first, fusion), fused(pairs.second, fusion))


def compared(pairs: Pairs, fusion: Fusion) -> dict[str, dict[str, float]]:
    """Retrieval by text alone, by image alone, by the untrained fusion, and by this one."""
    names = fusion.text_model, fusion.image_model
    sizes = len(fusion.text_mean), len(fusion.image_mean)
    return {
        "text alone": _retrieval(pairs.first.text, pairs.second.text),
        "image alone": _retrieval(pairs.first.image, pairs.second.image),
        "untrained": retrieval(pairs, untrained(*names, *sizes, fusion.dims)),
        "fitted": retrieval(pairs, fusion),
    }


def _retrieval(queries: np.ndarray, found: np.ndarray) -> dict[str, float]:
    scores = queries @ found.T
    own = np.diag(scores)[:, None]
    # A tie counts half, so that a constant vector finds nothing.
    ranks = 1 + (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    return {
        "recall_at_1": round(float((ranks < 2).mean()), 4),
        "mrr": round(float((1 / ranks).mean()), 4),
    }


def write_untrained(
    name: str, text_model: str, image_model: str, text_weight: float, folder: Path
) -> None:
    """Write the untrained fusion of two models of the repository in `folder`.

    Raises:
        ModelNotFound: the repository lacks one of them.
        InvalidInput: the first embeds no texts, or the second no images.
    """
    _check_name(name, folder)
    text, image = _facts(text_model, "text", folder), _facts(image_model, "image", folder)
    projection = untrained(text_model, image_model, text.dims, image.dims, DIMS, text_weight)
    # Without the projection's bytes: their last bits differ between processors.
    space = key_of("untrained", text.space, image.space, str(DIMS), str(text_weight))
    _write(name, projection, space, {"fusion": UNTRAINED, "text_weight": text_weight}, folder)


def write_fitted(
    name: str, text_model: str, image_model: str, pairs_file: Path, folder: Path
) -> dict[str, dict[str, float]]:
    """Fit a fusion to the pairs of a file, measure it on held-out pairs, and write it.

    Each line is `{"text": [first, second], "image": [path, path]}`: two views of one thing. Paths
    are relative to the file.

    Raises:
        ModelNotFound: the repository lacks one of the models.
        InvalidInput: the file has no valid pairs.
        QualityError: the fitted fusion retrieves no better than the untrained one.
    """
    _check_name(name, folder)
    text, image = _facts(text_model, "text", folder), _facts(image_model, "image", folder)
    pairs = _embedded(_read(pairs_file), text_model, image_model, pairs_file.parent, folder)
    order = np.random.default_rng(0).permutation(len(pairs))
    held = max(1, int(len(pairs) * HELD_OUT_SHARE))
    projection = fit(text_model, image_model, pairs.part(order[held:]))
    figures = compared(pairs.part(order[:held]), projection)
    for way, found in figures.items():
        console.print(f"  {way:12} recall@1 {found['recall_at_1']:.3f}, mrr {found['mrr']:.3f}")
    if figures["fitted"]["mrr"] <= figures["untrained"]["mrr"]:
        raise QualityError(
            "fitted to these pairs, the fusion retrieves no better than untrained. Give more of "
            "them, or use `tools fusion untrained`."
        )
    space = key_of(
        text.space, image.space, *(getattr(projection, one).tobytes().hex() for one in ARRAYS)
    )
    note = f"fitted to {len(pairs) - held} pairs"
    record = {"fusion": note, "held_out_pairs": held, "retrieval": figures}
    _write(name, projection, space, record, folder)
    return figures


def _check_name(name: str, folder: Path) -> None:
    """Raise unless a fusion can be written under this name."""
    names.check_servable(name)
    names.check_unshared(name, folder, fusion=True)
    check_writable(folder)


def _write(name: str, projection: Fusion, space: str, record: dict[str, Any], folder: Path) -> None:
    text, image = (
        _facts(projection.text_model, "text", folder),
        _facts(projection.image_model, "image", folder),
    )
    facts = dataclasses.replace(
        text,
        name=name,
        space=space,
        dims=projection.dims,
        normalised=True,
        heads={},
        special_ids=(),
        matryoshka=(),
        layer_norm_before_cut=False,
        image=image.image,
    )
    precisions = {
        _parameters(model, folder)["precision"]
        for model in (projection.text_model, projection.image_model)
    }
    record = {"model": name, "space": space, "precision": "+".join(sorted(precisions)), **record}
    repository.write_fusion(projection, facts, record, folder)
    console.print(f"  [green]✓[/] write: {name}, space {space}, {record['fusion']}")


def _facts(model: str, kind: str, folder: Path) -> ModelSpec:
    """The spec of a model that embeds texts or images."""
    found = configs.read(folder, model)
    if _parameters(model, folder).get("input", "text") != kind:
        raise InvalidInput(f"{model} embeds no {kind}s; name one that does.")
    return spec.load(found.folder)


def _parameters(model: str, folder: Path) -> dict[str, str]:
    written = model_config.read(folder / model / configs.CONFIG).parameters
    return {key: value.string_value for key, value in written.items()}


class _Views(NamedTuple):
    """One side of the pairs in a file."""

    texts: list[str]
    images: list[str]


def _read(path: Path) -> tuple[_Views, _Views]:
    try:
        lines = [json.loads(line) for line in read_lines(path, "--pairs") if line.strip()]
        first, second = (
            _Views([line["text"][side] for line in lines], [line["image"][side] for line in lines])
            for side in (0, 1)
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidInput(
            f"the file of pairs cannot be read ({type(error).__name__}); give a line of JSON each: "
            '{"text": [first, second], "image": [path, path]}.'
        ) from None
    _check_enough(len(first.texts) - max(1, int(len(first.texts) * HELD_OUT_SHARE)))
    return first, second


def _embedded(
    views: tuple[_Views, _Views], text_model: str, image_model: str, beside: Path, folder: Path
) -> Pairs:
    files = [_picture(beside / name) for view in views for name in view.images]
    texts = _engine(text_model, towers.TEXTS, folder)
    images = _engine(image_model, towers.IMAGES, folder)

    first, second = (vectors.normalise(texts.embed(view.texts)) for view in views)
    both = vectors.normalise(images.embed(files))
    return Pairs(Items(first, both[: len(first)]), Items(second, both[len(first) :]))


def _picture(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"a picture that the file of pairs names cannot be read: {reason(error)}. Paths are "
            "relative to the file."
        ) from None


def _engine(model: str, tower: towers.Tower, folder: Path) -> towers.Engine:
    """The served version of a model, run in this process."""
    found = configs.read(folder, model)
    facts = spec.load(found.folder)
    tokenizer = found.steps.get(f"{facts.name}-tokenizer", found.folder)
    graph = found.steps[f"{model}-onnx"] / session.FILE_NAME
    record = json.loads((found.folder / "quality.json").read_text())
    rows, name = tower.rows(tokenizer, facts), record.get("engine", towers.OPENVINO)
    return towers.Engine(graph, rows, facts, name=name)
