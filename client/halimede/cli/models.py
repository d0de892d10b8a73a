"""`halimede models`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from halimede.cli import options
from halimede.config.environment import Settings
from halimede.config.resolve import resolve
from halimede.inputs.content import InputKind
from halimede.models import catalogue
from halimede.providers.triton import provider
from halimede.results import ServedModel
from halimede_ops.errors import InvalidConfig, ModelNotFound
from halimede_repository import configs

INPUTS: Mapping[InputKind, str] = {
    "text": "text",
    "image": "image",
    "pair": "multimodal",
    "text_pair": "text pair",
}
"""Kind of a model's input → the word for it, of one that embeds that in `config.pbtxt`."""


def models(
    verbose: Annotated[
        bool, typer.Option(help="Show what the build measured, read from HALIMEDE_REPOSITORY.")
    ] = False,
    available: Annotated[
        bool, typer.Option("--available", help="List the models that can be built.")
    ] = False,
    language: Annotated[
        str | None, typer.Option(help="With --available: a language, such as de.")
    ] = None,
    dims: Annotated[
        int | None, typer.Option(help="With --available: length of the vectors.")
    ] = None,
    max_parameters: Annotated[
        int | None, typer.Option(help="With --available: most weights, in millions.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="With --available: a licence, such as MIT.")
    ] = None,
    use_case: Annotated[
        str | None,
        typer.Option(help="With --available: a use case, such as retrieval, code or biomedical."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="With --available: dense, reranker, classifier, sparse or late_interaction."
        ),
    ] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """List the models that a server has ready, or that can be built."""
    if available:
        rows = catalogue.filtered(
            language=language,
            dims=dims,
            max_parameters_million=max_parameters,
            licence=licence,
            use_case=use_case,
            kind=kind,
        )
        options.print_rows([_available_row(row) for row in rows], as_json, "no model matches")
        return
    repository = Settings().repository
    served = [_served_row(model, repository, verbose) for model in served_models(url, timeout_s)]
    options.print_rows(served, as_json, "no model is ready")


def served_models(url: str | None, timeout_s: float | None) -> list[ServedModel]:
    """Return the models that a server has ready.

    Raises:
        InvalidConfig: the default model has another provider than Triton.
    """
    first = resolve(url=url, timeout_s=timeout_s).chain()[0]
    if not isinstance(first, provider.Options):
        raise InvalidConfig(
            f"{first.model_id} has the provider {first.provider}, which lists no models. "
            "Give --url of a Triton server."
        )
    return provider.served_models(first)


def _available_row(row: catalogue.Model) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "dims": row.dims,
        "max_tokens": row.max_tokens,
        "parameters_million": row.parameters_million,
        "languages": ", ".join(row.languages),
        "use_case": row.use_case,
        "licence": row.licence + (" (must be accepted)" if row.restricted else ""),
        "notes": ", ".join([*row.tags, *(["custom code"] if row.custom_code else [])]),
    }


def _served_row(model: ServedModel, repository: Path, verbose: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": model.name,
        "kind": model.kind,
        "input": INPUTS[model.input],
        "precision": model.precision,
        "dims": model.dims,
        "max_tokens": model.max_tokens,
        "space": model.space,
    }
    if verbose:
        row |= _quality(repository, model)
    return row


def _quality(repository: Path, model: ServedModel) -> dict[str, Any]:
    """What the build measured, if the served model is the one in the repository."""
    try:
        record = json.loads(
            (configs.read(repository, model.name).folder / "quality.json").read_text()
        )
    except (OSError, ValueError, ModelNotFound):
        return {}
    if record["space"] != model.space:
        return {}
    names = (
        "engine", "arithmetic", "texts", "mean_cosine", "p1_cosine", "min_cosine", "kendall_tau",
        "ndcg_10", "invariance", "size_ratio",
    )  # fmt: skip
    return {name: record[name] for name in names if name in record}
