"""`halimede deploy`: replace a served model by a new version without failed requests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast

import typer

from halimede.cli.options import AsJson, print_rows, read_texts
from halimede.config.file import parse
from halimede.pipeline.canary import REFRESH_S
from halimede.providers.triton.provider import Options
from halimede_ops.errors import InvalidInput
from halimede_tools.settings import Settings

if TYPE_CHECKING:
    from halimede_tools.deploy.deployment import Deployment

app = typer.Typer(
    no_args_is_help=True,
    help="Load, compare, promote or roll back a candidate (`halimede build --candidate`).",
)
Model = Annotated[str, typer.Argument(help="Name that the model is served under.")]


class ServerAccess(NamedTuple):
    """Addresses of the servers, and the key of their model control."""

    options: Options
    key: str
    """Key of model control; empty: none."""


@app.callback()
def server_access(
    context: typer.Context,
    url: Annotated[
        list[str] | None, typer.Option(help="Server of the repository; repeat it for several.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--control-key-file", help="File with the key of model control."),
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="PEM certificates that sign servers.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate of this client.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
) -> None:
    """Read the options of the servers. They come before the verb."""
    files = {"ca_file": tls_ca, "cert_file": tls_cert, "key_file": tls_key}
    settings = {"url": url or Settings().url, "tls": {k: v for k, v in files.items() if v}}
    provider = {"provider": "triton", "model_id": "", **{k: v for k, v in settings.items() if v}}
    options = parse({"models": {"servers": provider}}).models["servers"]
    context.obj = ServerAccess(cast(Options, options), _key(key_file))


def _key(file: Path | None) -> str:
    try:
        return file.read_text().strip() if file else ""
    except OSError as error:
        raise InvalidInput(f"--control-key-file cannot be read: {error.strerror}.") from None


@app.command()
def publish(context: typer.Context, model: Model) -> None:
    """Load and warm up the candidate, without a share of the requests."""
    with _locked_deployment(context, model) as deployment:
        for name, version in deployment.publish().items():
            print(f"{name}: candidate {version} is loaded and warm; it answers nothing yet")


@app.command("shadow")
def shadow_command(
    context: typer.Context,
    model: Model,
    texts: Annotated[
        Path | None, typer.Option(help="File with texts to compare on, one per line.")
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="Also write a .prom file for node_exporter.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the candidate with the model: cosines of their vectors, and latencies."""
    from halimede_tools.build.samples import corpus
    from halimede_tools.deploy import shadow

    sample = read_texts(None, texts) if texts else corpus.mixed_texts(shadow.SAMPLE_TEXTS)
    if not sample:
        raise InvalidInput("--texts has no line; give one text a line.")
    if metrics and not metrics.absolute().parent.is_dir():
        raise InvalidInput(
            "--metrics is in a folder that does not exist; make it, or name another."
        )
    with _deployment(context, model) as deployment:
        comparisons = [
            shadow.compare(name, context.obj.options, sample) for name in deployment.pending()
        ]
        for comparison in comparisons:
            shadow.write_record(comparison, deployment.folder)
    if metrics:
        shadow.export(comparisons, metrics)
    print_rows(list(shadow.table_rows(comparisons)), as_json, "nothing to compare")


@app.command()
def canary(
    context: typer.Context,
    model: Model,
    share: Annotated[float, typer.Option(help="Share of the requests, from 0 to 1.")],
) -> None:
    """Route a share of the requests of halimede's clients to the candidate."""
    with _locked_deployment(context, model) as deployment:
        for name, version in deployment.canary(share).items():
            print(
                f"{name}: candidate {version} answers {share:.1%}; "
                f"clients follow in {REFRESH_S:g} s"
            )


@app.command()
def promote(
    context: typer.Context,
    model: Model,
    change_space: Annotated[
        bool,
        typer.Option(
            "--change-space", help="Promote even if old and new vectors cannot be compared."
        ),
    ] = False,
) -> None:
    """Serve the candidate under the model's name; the previous version stays on disk."""
    with _locked_deployment(context, model) as deployment:
        for name, version in deployment.promote(change_space).items():
            print(f"{name}: version {version} is served")


@app.command()
def rollback(context: typer.Context, model: Model) -> None:
    """Remove the candidate; without one, serve the previous version again."""
    with _locked_deployment(context, model) as deployment:
        for name, version in deployment.roll_back().items():
            print(f"{name}: version {version} is served")


@app.command()
def status(context: typer.Context, model: Model, as_json: AsJson = False) -> None:
    """Show the served, candidate and previous versions."""
    with _deployment(context, model) as deployment:
        print_rows(list(deployment.status()), as_json, "nothing is served")


@contextlib.contextmanager
def _locked_deployment(context: typer.Context, model: str) -> Iterator[Deployment]:
    """The deployment of a model, locked against other builds and deployments of it."""
    from halimede_tools.build.steps import exclusive

    with _deployment(context, model) as deployment:
        with exclusive(deployment.built_as, Settings()):
            yield deployment


@contextlib.contextmanager
def _deployment(context: typer.Context, model: str) -> Iterator[Deployment]:
    # Imported here so that `halimede --help` starts fast.
    from halimede_tools.deploy.control import Control
    from halimede_tools.deploy.deployment import Deployment

    options, key = context.obj
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Control(url, options.tls, key)) for url in options.url]
        yield Deployment(model, Settings().repository, servers)
