"""A CLIP's image ensembles under load against transformers, in one run."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpcclient
from PIL import Image

from halimede_ops import vectors
from halimede_tools.bench import machine
from halimede_tools.build import describe
from halimede_tools.build.describe import ModelOptions
from halimede_tools.build.repository import IMAGE_SUFFIX, served_name
from halimede_tools.build.samples import pictures
from halimede_tools.build.steps import console
from halimede_tools.serve import wheel
from halimede_tools.settings import ROOT, Settings

IMAGES = 128
"""JPEG files of 640 x 480 pixels, drawn, each once a round."""
CONCURRENCY = 16
"""Requests of one image on their way; images in one of transformers' batches."""
REFERENCE = "transformers"
PACKAGES = ("onnxruntime-openvino", "nvidia-pytriton", "pillow", "torch", "transformers")


def bench_images(
    settings: Settings, folder: Path, model: str, precisions: Sequence[str], rounds: int
) -> Path:
    """Measure, print the table and write the report; `folder` is the model's source."""
    form = pictures.Form("JPEG", "RGB", {"quality": 90})
    files = [pictures.encoded(pictures.drawn(seed, 640, 480), form) for seed in range(IMAGES)]
    names = {precision: served_name(model + IMAGE_SUFFIX, precision) for precision in precisions}
    options = wheel.Options(models=tuple(names.values()))
    with tempfile.TemporaryDirectory() as run:
        with wheel.serve(settings.repository, settings.python_backend, Path(run), options) as up:
            with grpcclient.InferenceServerClient(up.grpc_address) as client:
                ways: dict[str, Callable[[list[bytes]], np.ndarray]] = {
                    REFERENCE: _transformers(folder, model),
                    **{name: _served(client, served) for name, served in names.items()},
                }
                expected = ways[REFERENCE](files)
                cosines = {
                    name: float(vectors.cosine(embed(files), expected).mean())
                    for name, embed in ways.items()
                }
                rates: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(rounds):  # in turn, so that all see the machine in the same state
                    for name, embed in ways.items():
                        rates[name].append(_images_per_s(embed, files))
    report = ROOT / "docs" / "benchmarks" / "images.md"
    report.write_text(_report(model, rates, cosines, rounds))
    console.print(report.read_text(), markup=False)
    return report


def _images_per_s(embed: Callable[[list[bytes]], np.ndarray], files: list[bytes]) -> float:
    began = time.perf_counter()
    embed(files)
    return len(files) / (time.perf_counter() - began)


def _transformers(folder: Path, model: str) -> Callable[[list[bytes]], np.ndarray]:
    """Decode, preprocess and run as transformers' users do, in batches, on all cores."""
    import torch
    from transformers.image_utils import load_image

    clip = describe.load(folder, ModelOptions(model))[0].auto_model.eval()
    processor = describe.image_processor(folder, model)

    def embed(files: list[bytes]) -> np.ndarray:
        parts = []
        for start in range(0, len(files), CONCURRENCY):
            part = files[start : start + CONCURRENCY]
            seen = [load_image(Image.open(io.BytesIO(file))) for file in part]
            with torch.inference_mode():
                given = processor(seen, return_tensors="pt")
                parts.append(clip.get_image_features(**given).numpy())
        return np.concatenate(parts)

    return embed


def _served(
    client: grpcclient.InferenceServerClient, model: str
) -> Callable[[list[bytes]], np.ndarray]:
    """One request an image, CONCURRENCY on their way."""

    def one(file: bytes) -> np.ndarray:
        tensor = grpcclient.InferInput("IMAGE", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[file]], np.object_))
        return np.asarray(client.infer(model, [tensor]).as_numpy("EMBEDDING"))

    def embed(files: list[bytes]) -> np.ndarray:
        with ThreadPoolExecutor(CONCURRENCY) as senders:
            return np.concatenate(list(senders.map(one, files)))

    return embed


def _report(
    model: str, rates: dict[str, list[float]], cosines: dict[str, float], rounds: int
) -> str:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    lines = [
        "# Images",
        "",
        machine.taken("python -m halimede_tools bench-images", model, PACKAGES),
        "",
        f"{IMAGES} JPEG files of 640 x 480 pixels, images/s, medians of {rounds} rounds, in turn. "
        f"*{REFERENCE}*: decode, CLIPImageProcessor and CLIPModel (PyTorch, FP32) in one process, "
        f"batches of {CONCURRENCY}. The others: a server over gRPC, one image a request, "
        f"{CONCURRENCY} on their way; the client runs on the same cores.",
        "",
        f"| | images/s | × | mean cosine to {REFERENCE} |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {rate:.1f} | {rate / medians[REFERENCE]:.2f} | {cosines[name]:.6f} |"
        for name, rate in medians.items()
    ]
    return "\n".join(lines) + "\n"
