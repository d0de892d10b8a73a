"""Export a model's folder for sentence-transformers' backends, by its own functions. This is run as
a file in the environment of that peer.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import sentence_transformers
from sentence_transformers import SentenceTransformer


def export(folder: Path, calibration: Path) -> None:
    """Write `onnx/` and `openvino/`, each in FP32 and INT8, into the model's folder.

    `calibration` has one text a line.
    """
    for backend in ("onnx", "openvino"):
        model = SentenceTransformer(str(folder), backend=backend, local_files_only=True)
        with tempfile.TemporaryDirectory() as target:
            # Not into the folder itself: older versions cannot read what would be written there.
            model.save_pretrained(target)
            if backend == "onnx":
                sentence_transformers.export_dynamic_quantized_onnx_model(
                    model, "avx512_vnni", target
                )
            else:
                _static(model, target, calibration)
            shutil.copytree(Path(target) / backend, folder / backend)


def _static(model: SentenceTransformer, target: str, calibration: Path) -> None:
    from optimum.intel import OVQuantizationConfig

    with tempfile.TemporaryDirectory() as data:
        (Path(data) / "train.txt").write_bytes(calibration.read_bytes())
        sentence_transformers.export_static_quantized_openvino_model(
            model,
            OVQuantizationConfig(),
            target,
            dataset_name=data,
            dataset_config_name="default",
            dataset_split="train",
            column_name="text",
        )


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
