"""`halimede bench`: benchmarks; each writes a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halimede.extras import needs_extra
from halimede_tools.cli.options import DEFAULT_MODEL, Model, Precisions, names
from halimede_tools.settings import Settings

app = typer.Typer(invoke_without_command=True)
EXTRA = "server,build"
Rounds = Annotated[int, typer.Option(help="Measure each in turn, this many times.")]
Url = Annotated[str | None, typer.Option(help="Address of a running server. [HALIMEDE_URL]")]


@app.callback()
def peers(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    precisions: Precisions = "fp32,fp16,int8",
    cases: Annotated[
        str, typer.Option(help="Separated by commas: single, 100, 1000, …; all when empty.")
    ] = "",
    engines: Annotated[
        str, typer.Option(help="Parts of names, separated by commas: 'in process'; all when empty.")
    ] = "",
    rounds: Rounds = 3,
    append: Annotated[
        bool, typer.Option("--append", help="Keep the figures of earlier runs.")
    ] = False,
) -> None:
    """Measure every engine against its peers; write the report."""
    if context.invoked_subcommand is not None:
        return
    with needs_extra(EXTRA):
        from halimede_tools.bench.peers import compare

        compare.bench(
            Settings(),
            model,
            names(precisions),
            names(cases),
            names(engines),
            rounds,
            fresh=not append,
        )


@app.command()
def server(
    model: Model = DEFAULT_MODEL, precisions: Precisions = "fp32,int8", rounds: Rounds = 5
) -> None:
    """Measure the server under load against the engine alone."""
    with needs_extra(EXTRA):
        from halimede_tools.bench.serving.server import perf

        perf(Settings(), model, names(precisions), rounds)


@app.command()
def lone(
    model: Model = DEFAULT_MODEL, precisions: Precisions = "fp32,int8", rounds: Rounds = 20
) -> None:
    """Measure one text alone: what the client adds to the model and to a bare stub."""
    with needs_extra(EXTRA):
        from halimede_tools.bench.serving.lone import lone as bench_lone

        bench_lone(Settings(), model, names(precisions), rounds)


@app.command()
def designs(
    model: Model = DEFAULT_MODEL, precisions: Precisions = "fp32,int8", rounds: Rounds = 5
) -> None:
    """Measure the ensemble of three steps against one process that runs them all."""
    with needs_extra(EXTRA):
        from halimede_tools.bench.serving import designs

        designs.designs(Settings(), model, names(precisions), rounds)


@app.command()
def scaling(
    model: Model = DEFAULT_MODEL, precisions: Precisions = "fp32,int8", rounds: Rounds = 3
) -> None:
    """Measure a server by text length and cores, and two servers together."""
    with needs_extra(EXTRA):
        from halimede_tools.bench.serving.scaling import bench_scaling

        bench_scaling(Settings(), model, names(precisions), rounds)


@app.command()
def images(
    folder: Annotated[Path, typer.Argument(help="Folder of the original CLIP model.")],
    model: Annotated[str, typer.Option(help="Name that the model was built under.")],
    precisions: Precisions = "fp32,int8",
    rounds: Rounds = 3,
) -> None:
    """Measure image embeddings of a CLIP model under load against transformers."""
    with needs_extra(EXTRA):
        from halimede_tools.bench.images import bench_images

        bench_images(Settings(), folder, model, names(precisions), rounds)


@app.command()
def gateway(
    model: Model = DEFAULT_MODEL,
    precisions: Precisions = "fp32,int8",
    rounds: Rounds = 5,
    peers: Annotated[bool, typer.Option(help="Measure infinity's server too.")] = True,
) -> None:
    """Measure the gateway under load against direct gRPC and infinity's server."""
    with needs_extra(EXTRA):
        from halimede_tools.bench.serving.gateway import bench_gateway

        bench_gateway(Settings(), model, names(precisions), rounds, peers)


@app.command()
def rerank(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder of a reranker. Default: random weights in MiniLM's shape."),
    ] = None,
    precisions: Precisions = "fp32,fp16,int8",
    rounds: Rounds = 8,
) -> None:
    """Measure reranking in process against sentence-transformers' CrossEncoder."""
    with needs_extra(EXTRA):
        from halimede_tools.bench.rerank import bench_rerank

        bench_rerank(Settings(), folder, names(precisions), rounds)


@app.command()
def bulk(
    model: Model = DEFAULT_MODEL,
    precision: Annotated[str, typer.Option(help="Precision of the model.")] = "int8",
    rows: Annotated[int, typer.Option(help="Rows of the dataset.")] = 1_000_000,
    rounds: Rounds = 10,
) -> None:
    """Measure `halimede bulk` against the engine, with Ray, and on clusters of 1, 2 and 4 nodes."""
    with needs_extra("bulk-ray"):
        from halimede_tools.bench.datasets.bulk import bench_bulk

        bench_bulk(Settings(), model, precision, rows, rounds)


@app.command()
def cache() -> None:
    """Measure cache hits and hash embeddings against their required rates."""
    with needs_extra("redis"):
        from halimede_tools.bench.cache import bench_cache

        bench_cache()


@app.command()
def quality(
    file: Annotated[
        Path, typer.Option(help="One text a line, or a .tsv with score, sentence1, sentence2.")
    ],
    model: Model = DEFAULT_MODEL,
    precisions: Precisions = "fp32,fp16,int8",
) -> None:
    """Compare each precision's vectors with sentence-transformers', by length of the text."""
    with needs_extra(EXTRA):
        from halimede_tools.bench.quality import quality as bench_quality

        bench_quality(Settings(), model, names(precisions), file)


@app.command()
def sts(
    file: Annotated[Path, typer.Option(help="Tab-separated: score, sentence1, sentence2.")],
    models: Annotated[str, typer.Option(help="Names, separated by commas.")] = DEFAULT_MODEL,
    url: Url = None,
) -> None:
    """Print STS Spearman x100 of models on a running server."""
    from halimede import Embedder

    with needs_extra("build"):
        from halimede_tools.build.samples.sts import spearman
    for model in names(models):
        with Embedder(url, model) as embedder:
            score = spearman(file, lambda texts: embedder.embed(texts).vectors)
            print(f"{model}\t{score:.3f}")


@app.command()
def mteb(
    tasks: Annotated[
        str,
        typer.Option(
            help="Separated by commas: handbook, a .tsv of STS, a BEIR folder, mteb's own names."
        ),
    ] = "handbook",
    model: Model = DEFAULT_MODEL,
    url: Url = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with a data set's folder for each of mteb's names.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for mteb's result files; none when empty.")
    ] = None,
) -> None:
    """Run tasks of mteb's on a model of a running server, on data that is on this machine."""
    from halimede import as_sentence_transformer

    with needs_extra("mteb"):
        from halimede_tools.bench.mteb.run import run_tasks

        with as_sentence_transformer(model, url=url) as encoder:
            for score in run_tasks(encoder, names(tasks), data, output):
                print(f"{score.task}\t{score.measure}\t{score.score:.4f}")


@app.command()
def gpu(
    model: Model = DEFAULT_MODEL,
    precisions: Precisions = "fp32,fp16,int8",
    device: Annotated[
        str, typer.Option(help="cuda, tensorrt, or cpu to compare without a GPU.")
    ] = "cuda",
    rounds: Rounds = 3,
) -> None:
    """Measure the model on this machine's GPU against sentence-transformers."""
    with needs_extra(EXTRA):
        from halimede_tools.bench import gpu

        gpu.gpu_check(Settings(), model, names(precisions), device, gpu.Extent(rounds))
