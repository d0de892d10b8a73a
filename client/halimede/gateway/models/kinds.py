"""Kinds of models: which one a request asks, and scores as probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from halimede.gateway.calls import Call
from halimede.gateway.errors import Problem
from halimede.gateway.models.served import Model
from halimede.inputs.content import KINDS
from halimede.results import Classification, Scores, ServedModel
from halimede_repository.configs import MAXSIM


class Kind(NamedTuple):
    """Models that a path is for."""

    what: str
    """What they are, for messages."""
    has: Callable[[ServedModel], bool]
    """Whether a model is one of them."""


EMBEDDER = Kind("an embedding model", lambda m: m.input == "text" and "vector" in m.outputs)
SPARSE = Kind("a model with sparse weights", lambda m: "sparse" in m.outputs)
MULTI = Kind("a model with a vector for each token", lambda m: "multi" in m.outputs)
RERANKER = Kind("a reranker", lambda m: m.kind == "reranker")
CLASSIFIER = Kind("a classifier", lambda m: m.kind == "classifier")


async def model_of(call: Call, name: str | None, kind: Kind, status: int = 400) -> Model:
    """Return the model of a name, which must be of a kind.

    Without a name it is the default model if that is of the kind, else the only such model served.

    Raises:
        ModelNotFound: there is none of this name.
        Problem: the model is of another kind; or none is named, and there is not just one to take.
    """
    if name:
        model = await call.model(name)
        if not kind.has(facts := await model.facts()):
            what = KINDS[facts.kind][0]
            raise Problem(status, f"{model.name} is {what}; give {kind.what}.", param="model")
        return model
    default = await call.served.model(None)
    if kind.has(await default.facts()):
        return await call.model(None)
    names = [
        model.name
        for model in await call.served.all()
        if kind.has(await model.facts()) and _may_ask(call, model.name)
    ]
    # Beside a late-interaction model, its second model scores pairs by its vectors.
    own = [name for name in names if not name.endswith(MAXSIM)] or names
    if len(own) == 1:
        return await call.model(own[0])
    if names:
        raise Problem(status, f"give {kind.what}: one of {', '.join(names)}.", param="model")
    raise Problem(status, f"{kind.what} is needed, and none is served.", param="model")


def _may_ask(call: Call, name: str) -> bool:
    try:
        call.caller.check_model(name)
    except Problem:
        return False
    return True


PROBES = (
    ("Where do penguins live?", "Penguins live on the coasts of Antarctica."),
    ("Where do penguins live?", "The museum opens at nine."),
    ("heat pump", "A heat pump warms a house with the heat of the air outside."),
    ("heat pump", ""),
    ("capital of France", "Paris is the capital of France."),
    ("capital of France", "Add the flour, then stir until the dough is smooth."),
)
"""Pairs of a query and a document, related and unrelated: their logits are not all in 0 … 1."""
_are_probabilities: dict[str, bool] = {}
"""Space → whether its scores are in 0 … 1."""


async def are_probabilities(model: Model, result: Scores | Classification) -> bool:
    """Return whether the scores of a model are probabilities already, and not logits.

    That depends on the activation which the model's folder names, and no server tells it. It is
    found once for each space, by the scores of PROBES.
    """
    if not _are_unit(result.scores):
        _are_probabilities[result.space] = False
    if result.space not in _are_probabilities:
        probe: Scores | Classification
        if isinstance(result, Classification):
            probe = await model.classify([text for pair in PROBES for text in pair])
        else:
            probe = await model.score(PROBES)
        _are_probabilities[probe.space] = _are_unit(probe.scores)
    return _are_probabilities.get(result.space, True)


async def probabilities(model: Model, result: Scores | Classification) -> np.ndarray:
    """Return scores in 0 … 1, in the shape of `result.scores`, float64.

    Of a model with logits they are their sigmoid, or their softmax if it has several labels.
    """
    scores = result.scores.astype(np.float64)
    if await are_probabilities(model, result):
        return scores
    if scores.ndim == 2 and scores.shape[1] > 1:
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))
    return sigmoid(scores)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Return the sigmoid of scores, in their shape, float64."""
    return np.asarray(0.5 * (1 + np.tanh(scores.astype(np.float64) / 2)))


async def logits(model: Model, ranking: Scores) -> np.ndarray:
    """Return the logits of a reranker's scores, `[rows]` float64. They are finite."""
    scores = ranking.scores.astype(np.float64)
    if not await are_probabilities(model, ranking):
        return scores
    limit = float(np.finfo(np.float32).eps) / 2
    inside = scores.clip(float(np.finfo(np.float32).tiny), 1 - limit)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _are_unit(scores: np.ndarray) -> bool:
    return bool(((scores >= 0) & (scores <= 1)).all())
