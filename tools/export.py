"""Export: a model's folder to `model.onnx` (tokens in, pooled vector out) and `tokenizer.json`.

Pooling and the modules after it are part of the graph, as sentence-transformers runs them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from halimede_ops.errors import BuildError
from halimede_ops.spec import POOLED, ModelSpec


def export(source: Path, spec: ModelSpec, folder: Path) -> None:
    """Write `model.onnx` (FP32, standard ONNX operators only) and `tokenizer.json` to `folder`.

    Raises:
        BuildError: optimum could not export the model.
    """
    with tempfile.TemporaryDirectory(dir=folder) as raw:
        _export_with_optimum(source, Path(raw))
        _keep_pooled_output(Path(raw) / "model.onnx", spec)
        _optimise(Path(raw) / "model.onnx", folder / "model.onnx")
        shutil.move(Path(raw) / "tokenizer.json", folder / "tokenizer.json")


def _export_with_optimum(source: Path, folder: Path) -> None:
    from optimum.exporters.onnx import main_export

    try:
        with _quiet():
            main_export(
                str(source),
                output=folder,
                task="feature-extraction",
                library_name="sentence_transformers",
                device="cpu",
                local_files_only=True,
                do_validation=False,  # our own check compares far more texts
            )
    except Exception as error:
        raise BuildError(f"optimum could not export {source.name}: {error}") from error


def _keep_pooled_output(path: Path, spec: ModelSpec) -> None:
    """Drop the token embeddings, which nothing serves, and state the pooled output's shape."""
    import onnx

    model = onnx.load(path)
    pooled = next(output for output in model.graph.output if output.name == POOLED)
    pooled.type.tensor_type.shape.dim[1].Clear()
    pooled.type.tensor_type.shape.dim[1].dim_value = spec.dims
    del model.graph.output[:]
    model.graph.output.append(pooled)
    onnx.save(model, path)


def _optimise(raw: Path, target: Path) -> None:
    """Fold constants and drop dead nodes; nothing that only onnxruntime understands, so that
    OpenVINO and TensorRT read the same file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(raw), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's warnings and transformers' notices: they say nothing of this model."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
