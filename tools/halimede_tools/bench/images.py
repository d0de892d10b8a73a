"""A model's image ensembles under load against transformers, in one run."""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpcclient
from PIL import Image

from halimede_ops import vectors
from halimede_tools.bench import closed_loop, report
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.kinds.recognise import takes_images_alone
from halimede_tools.build.repository import IMAGE_SUFFIX, served_name
from halimede_tools.build.samples import pictures
from halimede_tools.build.vision import encoder
from halimede_tools.console import console
from halimede_tools.progress import Progress
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

IMAGES = 128
"""JPEG files of 640 x 480 pixels, drawn, each once a round."""
CONCURRENCY = 16
"""Requests of one image on their way; images in one of transformers' batches."""
REFERENCE = "transformers"
Embed = Callable[[Sequence[bytes]], np.ndarray]
"""Vectors `[images, dims]` float32 of encoded images."""
PACKAGES = ("onnxruntime-openvino", "nvidia-pytriton", "pillow", "torch", "transformers")


def bench_images(
    settings: Settings, folder: Path, model: str, precisions: Sequence[str], rounds: int
) -> Path:
    """Measure, print the table and write the report; `folder` is the model's source."""
    form = pictures.Form("JPEG", "RGB", {"quality": 90})
    files = [pictures.encoded(pictures.drawn(seed, 640, 480), form) for seed in range(IMAGES)]
    base = model if takes_images_alone(folder) else model + IMAGE_SUFFIX
    names = {precision: served_name(base, precision) for precision in precisions}
    options = wheel.Options(models=tuple(names.values()))
    console.print("  starting Triton, loading transformers and comparing their vectors")
    with tempfile.TemporaryDirectory() as run:
        with wheel.serve(settings.repository, settings.python_backend, Path(run), options) as up:
            with grpcclient.InferenceServerClient(up.grpc_address) as client:
                ways: dict[str, Embed] = {
                    REFERENCE: _transformers(folder, model),
                    **{name: _served(client, served) for name, served in names.items()},
                }
                expected = ways[REFERENCE](files)
                cosines = {
                    name: float(vectors.cosine(embed(files), expected).mean())
                    for name, embed in ways.items()
                }
                rates = _rates(ways, files, rounds)
    return report.publish(
        report.FOLDER / "images.md",
        "Images",
        _conclusion(rates, cosines),
        report.origin("halimede bench images", model, PACKAGES),
        [
            f"{IMAGES} JPEG files of 640 x 480 pixels, images/s, medians of {rounds} rounds, in "
            f"turn. *{REFERENCE}*: decode, image processor and model (PyTorch, FP32) in one "
            f"process, batches of {CONCURRENCY}. The others: a server over gRPC, one image a "
            f"request, {CONCURRENCY} on their way; the client runs on the same cores."
        ],
    )


def _rates(ways: dict[str, Embed], files: Sequence[bytes], rounds: int) -> dict[str, list[float]]:
    """Images/s of each way, in turn, so that all see the machine in the same state."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with Progress("bench images", list(ways), rounds) as progress:
        for _ in range(rounds):
            for name, embed in ways.items():
                with progress.step(name):
                    load = closed_loop.threads(embed, [files], 1)
                load.raise_errors()
                rates[name].append(len(files) * load.per_s)
    return rates


def _transformers(folder: Path, model: str) -> Embed:
    """Decode, preprocess and run as transformers' users do, in batches, on all cores."""
    import torch
    from transformers.image_utils import load_image

    module, _ = encoder.load(folder, ModelOptions(model))
    processor = encoder.image_processor(folder, model)

    def embed(files: Sequence[bytes]) -> np.ndarray:
        parts = []
        for start in range(0, len(files), CONCURRENCY):
            part = files[start : start + CONCURRENCY]
            images = [load_image(Image.open(io.BytesIO(file))) for file in part]
            with torch.inference_mode():
                inputs = processor(images, return_tensors="pt")
                parts.append(module(inputs.pixel_values).numpy())
        return np.concatenate(parts)

    return embed


def _served(client: grpcclient.InferenceServerClient, model: str) -> Embed:
    """One request an image, CONCURRENCY on their way."""

    def embed(files: Sequence[bytes]) -> np.ndarray:
        embeddings: list[np.ndarray] = [np.empty(0)] * len(files)

        def send(row: int) -> None:
            tensor = grpcclient.InferInput("IMAGE", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[files[row]]], np.object_))
            embeddings[row] = client.infer(model, [tensor]).as_numpy("EMBEDDING")

        closed_loop.threads(send, range(len(files)), CONCURRENCY).raise_errors()
        return np.concatenate(embeddings)

    return embed


def _conclusion(rates: dict[str, list[float]], cosines: dict[str, float]) -> list[str]:
    medians = {name: statistics.median(listed) for name, listed in rates.items()}
    return report.table(
        ["", "images/s", "×", f"mean cosine to {REFERENCE}"],
        [
            (name, f"{rate:.1f}", f"{rate / medians[REFERENCE]:.2f}", f"{cosines[name]:.6f}")
            for name, rate in medians.items()
        ],
    )
