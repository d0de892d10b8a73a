"""`halimede health`."""

from __future__ import annotations

import json

import typer

from halimede.cli import options
from halimede.embedder import Embedder


def health(
    as_json: options.AsJson = False,
    url: options.Url = None,
    model: options.Model = None,
    config: options.ConfigFile = None,
    timeout_s: options.TimeoutS = None,
) -> None:
    """Embed a probe text with each provider; exit code 1 if none is healthy.

    A provider is healthy if it answers within 5 s.
    """
    with Embedder(url, model, config=config, timeout_s=timeout_s) as embedder:
        reports = embedder.health()
    if as_json:
        print(json.dumps(reports[0] if len(reports) == 1 else reports))
    else:
        for report in reports:
            options.print_facts(report, as_json=False)
    if not any(report["healthy"] for report in reports):
        raise typer.Exit(1)
