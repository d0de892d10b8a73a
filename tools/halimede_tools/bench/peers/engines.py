"""The engines that are compared, and what the peers need: a Python environment each, from the
package index alone, and a folder with the same weights.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx

from halimede_engine import session
from halimede_ops.errors import DownloadError, HalimedeError
from halimede_tools.build.graph import rewrite
from halimede_tools.build.repository import served_name
from halimede_tools.build.samples import corpus
from halimede_tools.console import console
from halimede_tools.settings import Settings

ENVIRONMENTS = {
    "sentence-transformers": (
        "sentence-transformers[onnx,openvino]==5.7.0",
        "datasets==5.0.1",
        "huggingface-hub==0.36.2",
        "nncf==3.4.0",
        "onnxruntime==1.31.1",
        "openvino==2026.4.1",
        "optimum-intel==1.27.0",
        "optimum-onnx==0.1.0",
        "torch==2.13.0",
        "transformers==4.57.6",
    ),
    "fastembed": ("fastembed==0.9.1", "onnxruntime==1.31.1"),
    "infinity": (
        "infinity-emb[torch,optimum]==0.0.78",
        "onnxruntime==1.31.1",
        "optimum==2.1.0",
        "sentence-transformers==3.4.1",
        "torch==2.13.0",
        "transformers==4.57.6",
    ),
    "infinity-server": (
        "infinity-emb[torch,optimum,server]==0.0.78",
        "onnxruntime==1.31.1",
        "optimum==2.1.0",
        "sentence-transformers==3.4.1",
        "torch==2.13.0",
        "transformers==4.57.6",
    ),
    "plot": ("matplotlib==3.10.8",),
}
"""Environment → its requirements, as they were measured."""
POOLED = "pooled.onnx"
"""The model in FP32 with its pooling, in the peers' folder."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """One way to embed."""

    title: str
    precision: str
    """Engines of one precision are compared."""
    arguments: tuple[str, ...]
    """Of its process: kind, then those of the kind; {model} is the peers' folder, {source} the
    model's own, {repository} and {name} are ours."""
    environment: str = ""
    """Of ENVIRONMENTS; empty: our own."""
    is_served: bool = False
    """Whether Triton embeds, and the process is but its client."""

    @property
    def name(self) -> str:
        """Title and precision."""
        return f"{self.title}, {self.precision}"


def _sentence_transformers(title: str, precision: str, *backend: str) -> Engine:
    environment = "sentence-transformers"
    return Engine(
        f"{environment}, {title}", precision, (environment, "{model}", *backend), environment
    )


REFERENCE = _sentence_transformers("torch", "fp32", "torch")
"""What every other is compared with: the speed, and the vectors."""
PEERS = (
    REFERENCE,
    _sentence_transformers("ONNX", "fp32", "onnx", "onnx/model.onnx"),
    _sentence_transformers("OpenVINO", "fp32", "openvino", "openvino/openvino_model.xml"),
    Engine("fastembed", "fp32", ("fastembed", "{model}", POOLED), "fastembed"),
    Engine("infinity, torch", "fp32", ("infinity", "{model}", "torch"), "infinity"),
    _sentence_transformers("ONNX dynamic", "int8", "onnx", "onnx/model_qint8_avx512_vnni.onnx"),
    _sentence_transformers(
        "OpenVINO static", "int8", "openvino", "openvino/openvino_model_qint8_quantized.xml"
    ),
)


def ours(precision: str) -> tuple[Engine, Engine]:
    """Our engine in process, and our Triton."""
    return (
        Engine("halimede, in process", precision, ("halimede", "{repository}", "{name}")),
        Engine("halimede, Triton", precision, ("triton", "{address}", "{name}"), is_served=True),
    )


def python(environment: str, settings: Settings) -> Path:
    """The Python of an environment, which is made when it is missing or has other requirements.

    Raises:
        DownloadError: the package index does not give a package of it.
    """
    if not environment:
        return Path(sys.executable)
    folder = settings.home / "bench" / environment
    made, wanted = folder / "requirements.txt", "\n".join(ENVIRONMENTS[environment])
    if not made.exists() or made.read_text() != wanted:
        console.print(f"  [cyan]•[/] environment of {environment} …")
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], environment)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        _run([*pip, *ENVIRONMENTS[environment]], environment)
        made.write_text(wanted)
    return folder / "bin" / "python"


def _run(command: list[str], environment: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DownloadError(f"the environment of {environment} was not made: {done.stderr[-400:]}")


def model_folder(settings: Settings, model: str) -> Path:
    """A folder with the model's own weights in the peers' form, and with what they export of it.

    Raises:
        HalimedeError: sentence-transformers could not export it.
    """
    built = settings.home / "models" / model
    folder = settings.home / "bench" / f"model-{model}"
    if (folder / "openvino").exists():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(built / "source", part)
    onnx.save(rewrite.load(built / "fp32" / session.FILE_NAME), part / POOLED)
    _limit_tokenizer(part)
    calibration = part / "calibration.txt"
    calibration.write_text("\n".join(" ".join(t.split()) for t in corpus.calibration_texts()))
    command = [
        str(python("sentence-transformers", settings)),
        str(Path(__file__).with_name("export.py")),
    ]
    done = subprocess.run(
        [*command, str(part), str(calibration)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise HalimedeError(f"sentence-transformers did not export: {done.stderr[-400:]}")
    part.replace(folder)
    return folder


def _limit_tokenizer(folder: Path) -> None:
    """Write the model's token limit into the tokenizer's file: some peers read it only there."""
    path = folder / "tokenizer_config.json"
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))


def arguments(engine: Engine, settings: Settings, model: str, address: str) -> list[str]:
    """The arguments of an engine's process."""
    values = {
        "source": str(settings.models / model / "source"),
        "repository": str(settings.repository),
        "name": served_name(model, engine.precision),
        "address": address,
    }
    if "{model}" in engine.arguments:  # it takes a minute to make
        values["model"] = str(model_folder(settings, model))
    return [argument.format(**values) for argument in engine.arguments]
