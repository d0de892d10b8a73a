"""GPU check: the repository on this machine's GPU, its vectors and its speed against
sentence-transformers on the same GPU.

Device `cpu` compares in the same way without one, which is how the tests run it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime

from halimede.providers.onnx import DEVICES
from halimede_engine import session
from halimede_ops import spec
from halimede_ops.errors import HalimedeError
from halimede_repository import configs
from halimede_tools.bench import machine
from halimede_tools.bench.peers import compare
from halimede_tools.bench.peers import report as bench_report
from halimede_tools.bench.peers.engines import Engine
from halimede_tools.build import model_config, plan, repository, towers
from halimede_tools.build.graph import rewrite
from halimede_tools.build.samples import corpus
from halimede_tools.build.steps import console, exclusive
from halimede_tools.settings import ROOT, Settings

FOLDER = ROOT / "docs" / "benchmarks"
CPU = model_config.CPU
ONE, TOGETHER, MANY = "single", "1000", "concurrency 32"
"""Of the benchmark's cases."""
CASES = tuple(case for case in compare.CASES if case.name in (ONE, TOGETHER, MANY))
PACKAGES = ("numpy", "torch", "sentence-transformers", "tokenizers")
PROVIDERS = {
    model_config.CUDA: "CUDAExecutionProvider",
    model_config.TENSORRT: "TensorrtExecutionProvider",
}


class Extent(NamedTuple):
    """How much is measured."""

    rounds: int = 3
    cases: tuple[compare.Case, ...] = CASES
    texts: int = 1000
    """To compare packed rows, and rows of one text, with."""
    budgets: tuple[int, ...] = (512, 4096, 16_384)
    """Most tokens of a run, for the same: a GPU wants more at a time than a CPU."""


FULL = Extent()


class Steps(NamedTuple):
    """What one precision of the model is made of."""

    model: Path
    """Its model.onnx."""
    tokenizer: Path
    """The folder of its tokenizer."""


REFERENCE = Engine(
    "sentence-transformers, CPU", "fp32", ("sentence-transformers", "{source}", "torch")
)
"""What vectors are compared with."""


def gpu_check(
    settings: Settings,
    model: str,
    precisions: Sequence[str],
    device: str,
    extent: Extent = FULL,
    folder: Path = FOLDER,
    first_port: int = compare.FIRST_PORT,
) -> Path:
    """Measure, write the report into the folder and print it; its path.

    Raises:
        HalimedeError: this machine cannot run the device: all that it lacks.
        BuildError: the model could not be built.
    """
    missing = lacking(device)
    if missing:
        raise HalimedeError(f"no GPU check for {device} here: {'; '.join(missing)}")
    report = folder / ("gpu.md" if device == model_config.CUDA else f"gpu-{device}.md")
    with tempfile.TemporaryDirectory() as scratch:
        ours = settings.model_copy(update={"repository": Path(scratch) / "repository"})
        names = write(ours, model, device)
        served = [precision for precision in names if precision in precisions]
        results = compare.Results(Path(scratch) / "results.jsonl", fresh=True)
        wanted = engines(device, served)
        with compare.started(ours, model, wanted, first_port) as running:
            compare.compare(running, results, REFERENCE)
            compared = [one for one in running if one.engine is not REFERENCE]
            for number in range(extent.rounds + 1):
                for case in extent.cases:
                    kept = results if number else compare.Results(Path(os.devnull), fresh=False)
                    compare.measure(compared, case, kept)
            compare.finish(compared, results)
        figures = bench_report.medians(results.lines())
        steps = {
            precision: _steps(ours.repository, model, names[precision]) for precision in served
        }
        lines = _report(device, model, wanted[1:], figures, steps, extent)
    report.write_text("\n".join(lines) + "\n")
    console.print(report.read_text(), markup=False)
    return report


def lacking(device: str) -> list[str]:
    """What this machine lacks to run on a device, and what to do about it; nothing for the CPU.

    Raises:
        InvalidInput: there is no such device.
    """
    model_config.check_device(device)
    if device == CPU:
        return []
    import torch

    provider = PROVIDERS[device]
    lacks = []
    if not _driver():
        lacks.append("no NVIDIA driver (libcuda.so.1): take a machine with an NVIDIA GPU")
    if provider not in onnxruntime.get_available_providers():
        lacks.append(
            f"onnxruntime without {provider}: pip uninstall onnxruntime-openvino, then pip install "
            "onnxruntime-gpu"
        )
    if device == model_config.TENSORRT and importlib.util.find_spec("tensorrt") is None:
        lacks.append("no TensorRT: pip install tensorrt")
    if not torch.cuda.is_available():
        lacks.append("torch without CUDA: install a build of it with CUDA")
    return lacks


def _driver() -> bool:
    try:
        return int(ctypes.CDLL("libcuda.so.1").cuInit(0)) == 0
    except OSError:
        return False


def write(settings: Settings, model: str, device: str) -> dict[str, str]:
    """Build the model for a device, from what the store has; precision → name of each.

    All precisions are built, as the store's checks are of all together.
    """
    wanted = plan.build_request(model, device=device)
    with exclusive(wanted.name, settings) as folder:
        texts = plan.make(wanted, folder, settings)[0]
    names = repository.write(texts, settings.repository)
    return dict(zip(texts.models, names, strict=True))


def _steps(repository: Path, model: str, name: str) -> Steps:
    steps = configs.read(repository, name).steps
    return Steps(steps[f"{name}-onnx"] / session.FILE_NAME, steps[f"{model}-tokenizer"])


def engines(device: str, precisions: Sequence[str]) -> list[Engine]:
    """REFERENCE, sentence-transformers on the device (on a GPU in FP16), and ours. In process,
    TensorRT has none of the parameters it needs.
    """
    torch_device, half = (CPU, "fp32") if device == CPU else (model_config.CUDA, "fp16")
    rival = Engine(
        f"sentence-transformers, {torch_device}",
        half,
        ("sentence-transformers", "{source}", "torch", "", torch_device, half),
    )
    ours = []
    for precision in precisions:
        if device != model_config.TENSORRT:
            name = f"halimede, in process, {device}"
            where = "auto" if device == CPU else device
            ours.append(Engine(name, precision, ("halimede", "{repository}", "{name}", where)))
        name = f"halimede, Triton, {device}"
        ours.append(Engine(name, precision, ("triton", "{address}", "{name}"), is_served=True))
    return [REFERENCE, rival, *ours]


def placed(model: Path, device: str) -> dict[str, Counter[str]]:
    """Which provider takes how many nodes of which kind, in the order they are asked.

    Between two providers values are copied; on a GPU, what only the CPU takes costs such copies.
    """
    asked, _ = session.execution_providers(accelerators(device), 1, 1)
    options = session.session_options(asked)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    opened = onnxruntime.InferenceSession(str(model), options, providers=asked)
    found: dict[str, Counter[str]] = {name: Counter() for name, _ in asked}
    for part in opened.get_provider_graph_assignment_info():
        found[part.ep_name].update(node.op_type for node in part.get_nodes())
    return found


def accelerators(device: str) -> list[session.Accelerator]:
    """A device's, best first."""
    return [session.Accelerator(name) for name in DEVICES["openvino" if device == CPU else device]]


def packing(steps: Steps, device: str, extent: Extent) -> dict[tuple[str, int], float]:
    """Texts/s of mixed texts, by `packed` (several a row) or `apart` (one a row), and by the most
    tokens of a run; medians of rounds in turn, after one that warms. Empty where the model takes
    one text a row alone.
    """
    if session.PACKED not in _metadata(steps.model):
        return {}
    facts = spec.load(steps.tokenizer)
    texts = corpus.mixed_texts(extent.texts)
    rows = towers.text_rows(steps.tokenizer, facts)(texts)
    took: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"packed": steps.model, "apart": one_text_a_row(steps.model, Path(folder))}
        opened = {
            (kind, budget): session.open_session(
                path,
                accelerators(device),
                threads=2,
                streams=2,
                max_tokens=facts.max_tokens,
                micro_batch_tokens=budget,
            )[0]
            for kind, path in files.items()
            for budget in extent.budgets
        }
        for number in range(extent.rounds + 1):
            for key, one in opened.items():
                began = time.perf_counter()
                one.run(rows)
                if number:
                    took.setdefault(key, []).append(time.perf_counter() - began)
    return {key: len(texts) / statistics.median(each) for key, each in took.items()}


def one_text_a_row(model: Path, folder: Path) -> Path:
    """A copy of a packed model that says nothing of packing, so its rows have one text each."""
    copied = rewrite.load(model)
    kept = [entry for entry in copied.metadata_props if entry.key != session.PACKED]
    del copied.metadata_props[:]
    copied.metadata_props.extend(kept)
    path = folder / session.FILE_NAME
    rewrite.save(copied, path)
    return path


def _metadata(model: Path) -> dict[str, str]:
    loaded = onnx.load(model, load_external_data=False)
    return {entry.key: entry.value for entry in loaded.metadata_props}


def _report(
    device: str,
    model: str,
    wanted: Sequence[Engine],
    figures: bench_report.Figures,
    steps: Mapping[str, Steps],
    extent: Extent,
) -> list[str]:
    return [
        f"# On {device.upper()}",
        "",
        machine.taken(f"python -m halimede_tools gpu-check --device {device}", model, PACKAGES),
        _device(device),
        "",
        f"Medians of {extent.rounds} rounds, asked in turn, after one that warms. *one*: single "
        "texts of mixed length, one after the other. *1000*: mixed texts in one call. *32*: single "
        "texts, so many at a time. ×: to sentence-transformers on the same device. *cosine*: mean, "
        "to sentence-transformers in FP32 on the CPU. *alone*: lowest, of a text alone to the same "
        "text in a batch.",
        "",
        "| engine | one: p50, p99 ms | 1000: texts/s | × | 32: texts/s | start s | cosine "
        "| alone | holds |",
        "|---" * 9 + "|",
        *(_engine(engine, figures, wanted[0]) for engine in wanted),
        "",
        "## Who runs what",
        "",
        "Nodes of the model by the provider that takes them. Between providers values are copied.",
        "",
        *(line for precision, of in steps.items() for line in _placed(precision, of.model, device)),
        *_packed(steps, device, extent),
    ]


def _device(device: str) -> str:
    """What runs: onnxruntime's version, and the GPU with its driver's CUDA."""
    told = f"onnxruntime {onnxruntime.__version__}"
    if device == CPU:
        return f"{told}, no GPU."
    import torch

    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {told}."


def _engine(engine: Engine, figures: bench_report.Figures, rival: Engine) -> str:
    found = {case: of for (name, case), of in figures.items() if name == engine.name}
    rate, theirs = found[TOGETHER], figures[rival.name, TOGETHER]
    many, near = found[MANY], found["vectors"]
    bar = towers.BARS[engine.precision]
    holds = near["mean_cosine"] >= bar.mean_cosine and near["invariance"] >= bar.invariance
    cells = [
        engine.name,
        f"{found[ONE]['p50_ms']:.1f}, {found[ONE]['p99_ms']:.1f}",
        f"{rate['count'] / rate['seconds']:.0f}",
        f"{theirs['seconds'] / rate['seconds']:.1f}",
        f"{many['count'] / many['seconds']:.0f}",
        f"{found['process']['cold_start_s']:.1f}",
        f"{near['mean_cosine']:.6f}",
        f"{near['invariance']:.6f}",
        "" if engine is rival else "yes" if holds else "**no**",
    ]
    return f"| {' | '.join(cells)} |"


def _placed(precision: str, model: Path, device: str) -> list[str]:
    lines = []
    for provider, nodes in placed(model, device).items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in nodes.most_common())
        lines.append(f"- {precision}, {provider}: {nodes.total()} nodes. {kinds}".rstrip())
    return lines


def _packed(steps: Mapping[str, Steps], device: str, extent: Extent) -> list[str]:
    budgets = " | ".join(f"{budget} tokens" for budget in extent.budgets)
    lines = [
        "",
        "## Several texts a row",
        "",
        f"Texts/s of {extent.texts} mixed texts in one call, by how they lie in the model's rows "
        "and by the most tokens of a run.",
        "",
        f"| precision | rows | {budgets} |",
        "|---" * (2 + len(extent.budgets)) + "|",
    ]
    for precision, of in steps.items():
        rates = packing(of, device, extent)
        for kind in dict.fromkeys(kind for kind, _ in rates):
            cells = " | ".join(f"{rates[kind, budget]:.0f}" for budget in extent.budgets)
            lines.append(f"| {precision} | {kind} | {cells} |")
    return lines
