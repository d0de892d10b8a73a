"""The verbs of `halimede` that build, serve, deploy and measure; one file for each."""

from __future__ import annotations

import typer

from halimede_tools.cli import bench, build, deploy, fusion, serve, soak, tune


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command()(build.build)
    app.command()(serve.serve)
    app.add_typer(deploy.app, name="deploy")
    app.add_typer(bench.app, name="bench")
    app.command()(tune.tune)
    app.command()(soak.soak)
    app.add_typer(fusion.app, name="fusion")
