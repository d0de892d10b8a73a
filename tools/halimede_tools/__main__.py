"""`python -m halimede_tools`: build a model, serve it, measure it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from halimede.models import catalogue
from halimede_ops.errors import HalimedeError, InvalidInput
from halimede_tools.deploy.commands import app as deploy_app
from halimede_tools.settings import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def build(
    model: Annotated[
        str, typer.Argument(help="Name in the catalogue, or path of a model's folder.")
    ] = catalogue.DEFAULT,
    name: Annotated[
        str | None, typer.Option(help="Name to serve it under; default: the model's or folder's.")
    ] = None,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,fp16,int8",
    accept: Annotated[
        str, typer.Option(help="Precisions to publish even if they miss their bar.")
    ] = "",
    accept_licence: Annotated[
        str | None, typer.Option(help="A restricted licence that you have read, by its name.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the folder carries.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or tensorrt: what the configs ask for.")
    ] = "cpu",
    max_tokens: Annotated[
        int | None, typer.Option(help="Token limit to serve with; at most the model's.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt of an input type: 'query=search: '.")
    ] = None,
    token_embeddings: Annotated[
        bool, typer.Option("--token-embeddings", help="Also serve the last hidden state.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Texts to calibrate INT8 on, one a line.")
    ] = None,
    calibration_images: Annotated[
        Path | None, typer.Option(help="Folder of pictures to calibrate INT8 of images on.")
    ] = None,
    sts: Annotated[
        Path | None, typer.Option(help="STS file to score: score, sentence1, sentence2.")
    ] = None,
    candidate: Annotated[
        bool,
        typer.Option("--candidate", help="Beside the model of this name, for `tools deploy`."),
    ] = False,
) -> None:
    """Build a model's folders in the repository, doing only what is missing."""
    from halimede_tools.build.plan import build as build_model
    from halimede_tools.build.plan import build_request

    options: dict[str, Any] = {
        "precisions": _names(precisions),
        "accepted": _names(accept),
        "accepted_licence": accept_licence,
        "device": device,
        "calibration": calibration,
        "calibration_images": calibration_images,
        "sts": sts,
        "trust_remote_code": trust_remote_code,
        "max_tokens": max_tokens,
        "token_embeddings": token_embeddings,
    }
    if prompt:
        options["prompts"] = _prompts(prompt)
    build_model(build_request(model, name, **options), Settings(), candidate=candidate)


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _prompts(given: list[str]) -> dict[str, str]:
    prompts = {}
    for entry in given:
        input_type, equals, prompt = entry.partition("=")
        if not equals:
            raise InvalidInput("--prompt is not INPUT_TYPE=TEXT, such as 'query=search: '.")
        prompts[input_type] = prompt
    return prompts


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option()] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 to 65535.")] = 8001,
    metrics_port: Annotated[int, typer.Option()] = 8002,
    log_level: Annotated[str, typer.Option(help="error, warning, info or verbose.")] = "warning",
    models: Annotated[
        str, typer.Option(help="Names, separated by commas; all of the repository when empty.")
    ] = "",
    runtime: Annotated[
        str, typer.Option(help="wheel: Triton from PyPI; docker: NVIDIA's container.")
    ] = "wheel",
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate: gRPC with TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM certificates that sign clients: others are refused.")
    ] = None,
    control_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that model control asks for.")
    ] = None,
    trace_url: Annotated[
        str, typer.Option(help="OpenTelemetry collector: http://HOST:4318/v1/traces.")
    ] = "",
    trace_every: Annotated[int, typer.Option(help="Of so many requests one is traced.")] = 100,
    replace: Annotated[
        bool,
        typer.Option("--exec", help="Become Triton, for containers: build nothing, log to stdout."),
    ] = False,
    steps: Annotated[
        bool, typer.Option("--steps", help="On the wheel: each ensemble's steps, not one process.")
    ] = False,
    response_cache_mb: Annotated[
        int, typer.Option(min=0, help="Memory of each model for texts that come again; 0: none.")
    ] = 0,
) -> None:
    """Serve the repository with Triton, building first what is missing."""
    from halimede_tools.serve.wheel import Options, become, lay_out

    options = Options(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        log_level=log_level,
        models=_names(models),
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        control_key_file=control_key_file,
        steps=steps,
        response_cache_mb=response_cache_mb,
        trace_url=trace_url,
        trace_every=trace_every,
    )
    settings = Settings()
    if replace:
        backends = settings.backends or lay_out(
            settings.python_backend, settings.run(grpc_port) / "backends"
        )
        become(settings.repository, backends, options)
    from halimede_tools.serve.supervise import serve as serve_repository

    serve_repository(settings, options, runtime)


@app.command()
def perf(
    model: Annotated[str, typer.Option()] = catalogue.DEFAULT,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,int8",
    rounds: Annotated[int, typer.Option(help="Engine and server in turn, this often.")] = 5,
) -> None:
    """Measure the server under load against the engine alone; write the report."""
    from halimede_tools.bench.server import perf as measure

    measure(Settings(), model, _names(precisions), rounds)


@app.command()
def designs(
    model: Annotated[str, typer.Option()] = catalogue.DEFAULT,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,int8",
    rounds: Annotated[int, typer.Option(help="Engine and designs in turn, this often.")] = 3,
) -> None:
    """Measure four ways to serve the ensemble's contract; write the report."""
    from halimede_tools.bench.designs import designs as measure

    measure(Settings(), model, _names(precisions), rounds)


@app.command()
def sts(
    file: Annotated[Path, typer.Option(help="Tab-separated: score, sentence1, sentence2.")],
    models: Annotated[str, typer.Option(help="Names, separated by commas.")] = catalogue.DEFAULT,
    url: Annotated[str | None, typer.Option(help="A running server. [HALIMEDE_URL]")] = None,
) -> None:
    """Print STS Spearman x100 of models on a running server."""
    from halimede import Embedder
    from halimede_tools.build.samples.sts import spearman

    for model in _names(models):
        with Embedder(url, model) as embedder:
            score = spearman(file, lambda texts: embedder.embed(texts).vectors)
            print(f"{model}\t{score:.3f}")


app.add_typer(deploy_app, name="deploy")
fusion_app = typer.Typer(no_args_is_help=True, help="One vector for a text and an image.")
app.add_typer(fusion_app, name="fusion")
TextModel = Annotated[str, typer.Option("--text", help="Model of the repository for texts.")]
ImageModel = Annotated[str, typer.Option("--image", help="Model of the repository for images.")]


@fusion_app.command()
def untrained(
    image: ImageModel,
    text: TextModel = catalogue.DEFAULT,
    name: Annotated[str, typer.Option(help="Name to serve it under.")] = "multimodal",
    text_weight: Annotated[float, typer.Option(help="The texts' share of a similarity.")] = 0.5,
) -> None:
    """Write an orthonormal projection: it keeps the weighted sum of both similarities."""
    from halimede_tools.build.fusion import write_untrained

    write_untrained(name, text, image, text_weight, Settings().repository)


@fusion_app.command()
def fit(
    pairs: Annotated[Path, typer.Argument(help='Lines of {"text": [a, b], "image": [a, b]}.')],
    image: ImageModel,
    text: TextModel = catalogue.DEFAULT,
    name: Annotated[str, typer.Option(help="Name to serve it under.")] = "multimodal",
) -> None:
    """Fit the projection to pairs, two views of one thing each; print how well it retrieves."""
    from halimede_tools.build.fusion import write_fitted

    write_fitted(name, text, image, pairs, Settings().repository)


@app.command()
def bench_images(
    folder: Annotated[Path, typer.Argument(help="The CLIP's own folder.")],
    model: Annotated[str, typer.Option(help="Name it was built under.")],
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,int8",
    rounds: Annotated[int, typer.Option(help="Each in turn, this often.")] = 3,
) -> None:
    """Measure a CLIP's images under load against transformers; write the report."""
    from halimede_tools.bench.images import bench_images as measure

    measure(Settings(), folder, model, _names(precisions), rounds)


@app.command()
def bench(
    model: Annotated[str, typer.Option()] = catalogue.DEFAULT,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,fp16,int8",
    cases: Annotated[
        str, typer.Option(help="Separated by commas: single, 100, 1000, …; all when empty.")
    ] = "",
    engines: Annotated[
        str, typer.Option(help="Parts of names, separated by commas: 'in process'; all when empty.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Each engine in turn, this often.")] = 3,
    append: Annotated[
        bool, typer.Option("--append", help="Keep the figures of the runs before.")
    ] = False,
) -> None:
    """Measure every engine against its peers; write the report."""
    from halimede_tools.bench.peers.compare import bench as measure

    measure(
        Settings(),
        model,
        _names(precisions),
        _names(cases),
        _names(engines),
        rounds,
        fresh=not append,
    )


@app.command()
def soak(
    model: Annotated[str, typer.Option()] = catalogue.DEFAULT,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "int8",
    requests: Annotated[
        int, typer.Option(min=200, help="500,000 take 25 min on 2 cores.")
    ] = 500_000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 32,
) -> None:
    """Send mixed requests, check every answer, memory and drift; write the report."""
    from halimede_tools.bench import soak

    soak.soak(Settings(), model, _names(precisions), requests, concurrency, soak.REPORT)


@app.command()
def tune(
    model: Annotated[str, typer.Option()] = catalogue.DEFAULT,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,fp16,int8",
    seconds: Annotated[float, typer.Option(help="To measure for, all precisions together.")] = 60.0,
) -> None:
    """Find what runs a model fastest on this machine, and write it into the model's configs."""
    from halimede_tools.bench.tune import tune as find

    find(Settings(), model, _names(precisions), seconds)


@app.command()
def gpu_check(
    model: Annotated[str, typer.Option()] = catalogue.DEFAULT,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,fp16,int8",
    device: Annotated[
        str, typer.Option(help="cuda, tensorrt, or cpu to compare without a GPU.")
    ] = "cuda",
    rounds: Annotated[int, typer.Option(help="Each engine in turn, this often.")] = 3,
) -> None:
    """Measure the model on this machine's GPU against sentence-transformers; write the report."""
    from halimede_tools.bench import gpu

    extent = gpu.Extent(rounds)
    gpu.gpu_check(Settings(), model, _names(precisions), device, extent)


@app.command()
def bench_scaling(
    model: Annotated[str, typer.Option()] = catalogue.DEFAULT,
    precisions: Annotated[str, typer.Option(help="Separated by commas.")] = "fp32,int8",
    rounds: Annotated[int, typer.Option(help="Each load, this often.")] = 3,
) -> None:
    """Measure a server by its texts' length and its cores, and two together; write the report."""
    from halimede_tools.bench.scaling import bench_scaling as measure

    measure(Settings(), model, _names(precisions), rounds)


@app.command()
def bench_cache() -> None:
    """Measure cache hits and hash embeddings against the rates they must reach."""
    from halimede_tools.bench.cache import bench_cache as measure

    measure()


@app.command()
def audit() -> None:
    """Look for known vulnerabilities in what is installed, and for secrets in what git has."""
    from halimede_tools.audit import audit as look

    look()


def main() -> None:
    """Run a command; one of our own errors is one plain line and exit code 1."""
    try:
        app()
    except HalimedeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
