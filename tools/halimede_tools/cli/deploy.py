"""`halimede deploy`: a new version of a served model, without a request that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast

import typer

from halimede.cli.options import AsJson, print_rows, read_texts
from halimede.config.file import parse
from halimede.providers.triton.canary import CHECK_S
from halimede.providers.triton.provider import Options
from halimede_ops.errors import InvalidInput
from halimede_tools.settings import Settings

if TYPE_CHECKING:
    from halimede_tools.deploy.deployment import Deployment

app = typer.Typer(
    no_args_is_help=True,
    help="A candidate (`build --candidate`) beside a served model, in its place, and back.",
)
Model = Annotated[str, typer.Argument(help="Name that the model is served under.")]


class Reach(NamedTuple):
    """How the servers are reached."""

    options: Options
    key: str
    """Of model control; empty: there is none."""


@app.callback()
def reach(
    context: typer.Context,
    url: Annotated[
        list[str] | None, typer.Option(help="A server of the repository; repeat it for several.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--control-key-file", help="File with the key that model control asks for."),
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="PEM certificates that sign servers.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate of this client.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
) -> None:
    """How the servers are reached; given before the verb."""
    files = {"ca_file": tls_ca, "cert_file": tls_cert, "key_file": tls_key}
    given = {"url": url or Settings().url, "tls": {k: v for k, v in files.items() if v}}
    asked = {"provider": "triton", "model_id": "", **{k: v for k, v in given.items() if v}}
    options = parse({"models": {"servers": asked}}).models["servers"]
    context.obj = Reach(cast(Options, options), _key(key_file))


def _key(file: Path | None) -> str:
    try:
        return file.read_text().strip() if file else ""
    except OSError as error:
        raise InvalidInput(f"--control-key-file cannot be read: {error.strerror}.") from None


@app.command()
def publish(context: typer.Context, model: Model) -> None:
    """Load the candidate beside the model: warm, and without a share of its requests."""
    with _deploying(context, model) as deployment:
        for name, version in deployment.publish().items():
            print(f"{name}: candidate {version} is loaded and warm; it answers nothing yet")


@app.command("shadow")
def shadow_command(
    context: typer.Context,
    model: Model,
    texts: Annotated[Path | None, typer.Option(help="Texts to compare on, one a line.")] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="Also write a .prom file for node_exporter.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the candidate with the model: cosines of their vectors, latencies of both."""
    from halimede_tools.build.samples import corpus
    from halimede_tools.deploy import shadow

    sample = read_texts(None, texts) if texts else corpus.mixed_texts(shadow.TEXTS)
    if not sample:
        raise InvalidInput("--texts has no line; give one text a line.")
    with _deployment(context, model) as deployment:
        found = [shadow.compare(name, context.obj.options, sample) for name in deployment.waiting()]
        for one in found:
            shadow.record(one, deployment.folder)
    if metrics:
        shadow.export(found, metrics)
    print_rows(list(shadow.rows(found)), as_json, "nothing to compare")


@app.command()
def canary(
    context: typer.Context,
    model: Model,
    share: Annotated[float, typer.Option(help="Of the keys, from 0 to 1.")],
) -> None:
    """Have the candidate answer a share of what halimede's clients ask the model."""
    with _deploying(context, model) as deployment:
        for name, version in deployment.canary(share).items():
            print(
                f"{name}: candidate {version} answers {share:.1%}; clients follow in {CHECK_S:g} s"
            )


@app.command()
def promote(
    context: typer.Context,
    model: Model,
    change_space: Annotated[
        bool, typer.Option("--change-space", help="Also where its vectors cannot be compared.")
    ] = False,
) -> None:
    """Serve the candidate under the model's name; the version before stays on disk."""
    with _deploying(context, model) as deployment:
        for name, version in deployment.promote(change_space).items():
            print(f"{name}: version {version} is served")


@app.command()
def rollback(context: typer.Context, model: Model) -> None:
    """Take the candidate away; without one, serve the version before the promotion again."""
    with _deploying(context, model) as deployment:
        for name, version in deployment.roll_back().items():
            print(f"{name}: version {version} is served")


@app.command()
def status(context: typer.Context, model: Model, as_json: AsJson = False) -> None:
    """Show what is served, what waits, and what was served before."""
    with _deployment(context, model) as deployment:
        print_rows(list(deployment.status()), as_json, "nothing is served")


@contextlib.contextmanager
def _deploying(context: typer.Context, model: str) -> Iterator[Deployment]:
    """The deployment of a model that nothing else builds or deploys meanwhile."""
    from halimede_tools.build.steps import exclusive

    with _deployment(context, model) as deployment:
        with exclusive(deployment.built_as, Settings()):
            yield deployment


@contextlib.contextmanager
def _deployment(context: typer.Context, model: str) -> Iterator[Deployment]:
    # What reads vectors and models waits until it is needed: `tools` starts without.
    from halimede_tools.deploy.control import Control
    from halimede_tools.deploy.deployment import Deployment

    options, key = context.obj
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Control(url, options.tls, key)) for url in options.url]
        yield Deployment(model, Settings().repository, servers)
