"""`halimede build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halimede.extras import needs_extra
from halimede_ops.errors import InvalidInput
from halimede_tools.cli.options import DEFAULT_MODEL, Precisions, names
from halimede_tools.settings import Settings

Model = Annotated[str, typer.Argument(help="Name in the catalogue, or path of a model folder.")]
Name = Annotated[
    str | None,
    typer.Option(help="Name to serve it under; default: the name of the model or folder."),
]
Accept = Annotated[
    str, typer.Option(help="Precisions to publish even if they fail their quality check.")
]
AcceptLicence = Annotated[
    str | None, typer.Option(help="Name of a restricted licence that you have read and accept.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code from the model folder.")
]
Device = Annotated[str, typer.Option(help="Device in the model configs: cpu, cuda or tensorrt.")]
MaxTokens = Annotated[int | None, typer.Option(help="Token limit of a text; at most the model's.")]
Prompt = Annotated[
    list[str] | None, typer.Option(help="Prompt of an input type: 'query=search: '.")
]
TokenEmbeddings = Annotated[
    bool, typer.Option("--token-embeddings", help="Also serve the last hidden state.")
]
LateChunking = Annotated[
    bool,
    typer.Option(
        "--late-chunking",
        help="Also serve vectors of spans of a text, each made with the whole text as context.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="File with 100 or more texts to calibrate INT8 on, one per line."),
]
CalibrationImages = Annotated[
    Path | None,
    typer.Option(help="Folder of 50 or more images to calibrate INT8 of an image model on."),
]
Kind = Annotated[
    str | None,
    typer.Option(
        help="Kind of the model instead of what its folder says: dense, reranker, classifier, "
        "sparse or late_interaction."
    ),
]
Sts = Annotated[Path | None, typer.Option(help="STS file to score: score, sentence1, sentence2.")]
Candidate = Annotated[
    bool,
    typer.Option(
        "--candidate", help="Build a candidate of the served model, for `halimede deploy`."
    ),
]
Alias = Annotated[
    bool,
    typer.Option(
        "--alias",
        help="Also serve NAME-litellm and NAME-llamaindex, for LiteLLM's provider triton/ and "
        "LlamaIndex's embeddings-nvidia-triton.",
    ),
]


def build(
    model: Model = DEFAULT_MODEL,
    name: Name = None,
    precisions: Precisions = "fp32,fp16,int8",
    accept: Accept = "",
    accept_licence: AcceptLicence = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "cpu",
    max_tokens: MaxTokens = None,
    prompt: Prompt = None,
    token_embeddings: TokenEmbeddings = False,
    late_chunking: LateChunking = False,
    calibration: Calibration = None,
    calibration_images: CalibrationImages = None,
    kind: Kind = None,
    sts: Sts = None,
    candidate: Candidate = False,
    alias: Alias = False,
) -> None:
    """Build a model into the repository; skip steps that are done."""
    with needs_extra("build"):
        from halimede_tools.build import plan

    fields: plan.Fields = {
        "precisions": names(precisions),
        "accepted": names(accept),
        "accepted_licence": accept_licence,
        "device": device,
        "calibration": calibration,
        "calibration_images": calibration_images,
        "sts": sts,
        "trust_remote_code": trust_remote_code,
        "max_tokens": max_tokens,
        "token_embeddings": token_embeddings,
        "late_chunking": late_chunking,
        "kind": kind,
        "alias": alias,
    }
    if prompt:
        fields["prompts"] = _prompts(prompt)
    with needs_extra("build"):
        request = plan.build_request(model, name, **fields)
        plan.build(request, Settings(), candidate=candidate, published=_print)


def _print(ensembles: list[str]) -> None:
    """Print what has just been published: stdout is for programs."""
    print("\n".join(ensembles), flush=True)


def _prompts(entries: list[str]) -> dict[str, str]:
    prompts = {}
    for entry in entries:
        input_type, equals, prompt = entry.partition("=")
        if not equals:
            raise InvalidInput("--prompt is not INPUT_TYPE=TEXT, such as 'query=search: '.")
        prompts[input_type] = prompt
    return prompts
