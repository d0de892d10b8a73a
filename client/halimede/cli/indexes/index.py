"""`halimede index`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from halimede import index
from halimede.cli import options
from halimede.cli.datasets import progress
from halimede.config.resolve import in_process as run_in_process
from halimede.config.resolve import resolve
from halimede.embedder import Embedder
from halimede.index import Guard, Loaded, Price, SpaceRecord, open_store
from halimede.index.plan import SAMPLE
from halimede.index.stores.address import FORMS
from halimede_ops.errors import HalimedeError, InvalidInput, SpaceRefused

app = typer.Typer(
    no_args_is_help=True,
    help="Keep collections of vectors in one space: check, adopt, plan, re-embed.",
)

Address = Annotated[str, typer.Argument(help=f"Collection: {FORMS}.", metavar="STORE")]
Into = Annotated[str, typer.Option(help="Collection, table or index file to write.")]
IdField = Annotated[str | None, typer.Option(help="Column of the ids. Default: id.")]
TextField = Annotated[str | None, typer.Option(help="Column or key of the texts. Default: text.")]
VectorField = Annotated[
    str | None, typer.Option(help="Column or name of the vectors, where there are several.")
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--texts", help="Files with columns id and text, for FAISS. May be repeated."),
]
InProcess = Annotated[
    bool, typer.Option("--in-process", help="Run the model of HALIMEDE_REPOSITORY here.")
]


@app.command()
def check(
    store: Address,
    id_field: IdField = None,
    text_field: TextField = None,
    vector_field: VectorField = None,
    in_process: InProcess = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Print a collection's record; exit code 1 unless the model has its space and precision."""
    fields = {"id_field": id_field, "text_field": text_field, "vector_field": vector_field}
    with _guarded(store, fields) as guard:
        record = guard.record
        facts: dict[str, Any] = {"store": guard.store.name, "rows": guard.store.count()}
        facts |= {"record": "none"} if record is None else _facts(record)
        with _embedder(in_process, config, url=url, model=model, timeout_s=timeout_s) as embedder:
            try:
                guard.check(embedder)
                facts["agrees"] = True
            except SpaceRefused as error:
                facts |= {"agrees": False, "reason": str(error)}
    options.print_facts(facts, as_json)
    if not facts["agrees"]:
        raise typer.Exit(1)


@app.command()
def adopt(
    store: Address,
    replace: Annotated[bool, typer.Option("--replace", help="Replace another record.")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Believe it; compare no vectors.")
    ] = False,
    input_type: options.InputType = None,
    dimensions: options.Dimensions = None,
    id_field: IdField = None,
    text_field: TextField = None,
    vector_field: VectorField = None,
    in_process: InProcess = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Record that a collection's vectors are the model's, after a comparison of some of them."""
    fields = {"id_field": id_field, "text_field": text_field, "vector_field": vector_field}
    with (
        _guarded(store, fields) as guard,
        _embedder(in_process, config, url=url, model=model, timeout_s=timeout_s) as embedder,
    ):
        if unverified:
            served = embedder.model
            facts = (served.space, served.precision, dimensions or served.dims)
            record = guard.adopt(SpaceRecord(*facts, model=served.name), replace=replace)
        else:
            given = {"input_type": input_type, "dimensions": dimensions}
            record = guard.adopt(embedder, replace=replace, **given)
        shown = {"store": guard.store.name, **_facts(record)}
    options.print_facts(shown, as_json)


@app.command()
def plan(
    store: Address,
    texts: Texts = None,
    sample: Annotated[int, typer.Option(min=1, help="Texts that measure the rate.")] = SAMPLE,
    price_per_hour: Annotated[float | None, typer.Option(help="Price of an hour.")] = None,
    price_per_million_tokens: Annotated[
        float | None, typer.Option(help="Price of a million tokens.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the texts into this folder, for `halimede bulk`.")
    ] = None,
    input_type: options.InputType = None,
    dimensions: options.Dimensions = None,
    id_field: IdField = None,
    text_field: TextField = None,
    vector_field: VectorField = None,
    in_process: InProcess = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Print what it takes to re-embed a collection: rows, time and cost at the measured rate."""
    fields = {"id_field": id_field, "text_field": text_field, "vector_field": vector_field}
    with (
        _guarded(store, fields) as guard,
        _embedder(in_process, config, url=url, model=model, timeout_s=timeout_s) as embedder,
    ):
        made = index.plan(
            guard.store,
            embedder,
            texts=texts or (),
            sample=sample,
            price=Price(price_per_hour, price_per_million_tokens),
            input_type=input_type,
            dimensions=dimensions,
        )
        facts = made.facts()
        if export is not None:
            facts["exported"] = index.export(guard.store, export).rows
    if not as_json:
        facts |= {name: facts[name] or "none" for name in ("record", "tokens", "cost")}
        facts["record"] = str(made.record or "none")
        facts["target"] = str(made.target)
    options.print_facts(facts, as_json)


@app.command()
def load(
    vectors: Annotated[str, typer.Argument(help="Output of `halimede bulk`.")],
    store: Address,
    into: Into,
    id_field: IdField = None,
    text_field: TextField = None,
    vector_field: VectorField = None,
    as_json: options.AsJson = False,
) -> None:
    """Write the vectors of `halimede bulk` into a new collection like STORE, with their record."""
    fields = {"id_field": id_field, "text_field": text_field, "vector_field": vector_field}
    with _guarded(store, fields) as guard:
        loaded = index.load(guard.store, into, vectors)
    options.print_facts(_loaded(loaded), as_json)


@app.command()
def reembed(
    store: Address,
    into: Into,
    work: Annotated[Path, typer.Option(help="Folder for texts and vectors between the steps.")],
    texts: Texts = None,
    input_type: options.InputType = None,
    dimensions: options.Dimensions = None,
    id_field: IdField = None,
    text_field: TextField = None,
    vector_field: VectorField = None,
    in_process: InProcess = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Write a new collection with the model's vectors. The same command goes on where it ended."""
    fields = {"id_field": id_field, "text_field": text_field, "vector_field": vector_field}
    with (
        _guarded(store, fields) as guard,
        _embedder(in_process, config, url=url, model=model, timeout_s=timeout_s) as embedder,
        progress.shown("embedding") as show,
    ):
        loaded = index.reembed(
            guard.store,
            into,
            embedder,
            work,
            texts=texts or (),
            input_type=input_type,
            dimensions=dimensions,
            on_progress=show,
        )
    options.print_facts(_loaded(loaded), as_json)


@contextlib.contextmanager
def _guarded(address: str, fields: Mapping[str, str | None]) -> Iterator[Guard]:
    """Open a store; an error of its client is one line.

    Raises:
        InvalidInput: the client raised an error.
    """
    given = {name: text for name, text in fields.items() if text}
    try:
        with contextlib.closing(open_store(address, given)) as store:
            yield Guard(store)
    except (HalimedeError, typer.Exit, OSError):
        raise
    except Exception as error:  # each client has a tree of its own
        kind = type(error)
        said = str(error).strip().partition("\n")[0]
        raise InvalidInput(
            f"the store failed ({kind.__module__}.{kind.__name__}): {said}"
        ) from None


def _embedder(in_process: bool, config: Path | None, **given: Any) -> Embedder:
    resolved = resolve(config, **given)
    return Embedder(config=run_in_process(resolved) if in_process else resolved)


def _facts(record: SpaceRecord) -> dict[str, Any]:
    names = ("model", "space", "precision", "dims", "output_type")
    return {name: getattr(record, name) for name in names}


def _loaded(loaded: Loaded) -> dict[str, Any]:
    facts = {"store": loaded.store.name, "rows": loaded.rows, "left_out": loaded.left_out}
    return {**facts, **_facts(loaded.record)}
