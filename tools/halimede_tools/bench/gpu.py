"""GPU check: the repository on this machine's GPU, its vectors and its speed against
sentence-transformers on the same GPU.

Device `cpu` compares in the same way without one, which is how the tests run it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import tempfile
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
from halimede_tools.bench import closed_loop, report
from halimede_tools.bench.peers import compare, tables
from halimede_tools.bench.peers.engines import Engine
from halimede_tools.build import model_config, plan, repository, towers
from halimede_tools.build.graph import rewrite
from halimede_tools.build.samples import corpus
from halimede_tools.build.steps import exclusive
from halimede_tools.progress import Progress
from halimede_tools.settings import Settings

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
    folder: Path = report.FOLDER,
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
    with tempfile.TemporaryDirectory() as scratch:
        ours = settings.model_copy(update={"repository": Path(scratch) / "repository"})
        names = write(ours, model, device)
        served = [precision for precision in names if precision in precisions]
        results = compare.Results(Path(scratch) / "results.jsonl", fresh=True)
        wanted = engines(device, served)
        with compare.started(ours, model, wanted, first_port) as running:
            compare.compare(running, results, REFERENCE)
            compared = [process for process in running if process.engine is not REFERENCE]
            compare.measure(compared, extent.cases, extent.rounds, results)
        figures = tables.medians(results.lines())
        steps = {
            precision: _steps(ours.repository, model, names[precision]) for precision in served
        }
        details = _details(device, steps, extent)
    return report.publish(
        folder / ("gpu.md" if device == model_config.CUDA else f"gpu-{device}.md"),
        f"On {device.upper()}",
        _conclusion(wanted[1:], figures),
        f"{report.origin(f'halimede bench gpu --device {device}', model, PACKAGES)}\n"
        f"{_device(device)}",
        details,
    )


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
    """Provider → how many nodes of each kind it runs, in the order of preference.

    Between two providers values are copied; on a GPU, what only the CPU takes costs such copies.
    """
    providers, _ = session.execution_providers(accelerators(device), 1, 1)
    options = session.session_options(providers)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    opened = onnxruntime.InferenceSession(str(model), options, providers=providers)
    nodes: dict[str, Counter[str]] = {name: Counter() for name, _ in providers}
    for part in opened.get_provider_graph_assignment_info():
        nodes[part.ep_name].update(node.op_type for node in part.get_nodes())
    return nodes


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
    durations_s: dict[tuple[str, int], list[float]] = {}
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
        named = {f"{kind}, {budget} tokens a run": (kind, budget) for kind, budget in opened}
        with Progress("several texts a row", list(named), extent.rounds + 1) as progress:
            for number in range(extent.rounds + 1):
                for name, key in named.items():
                    with progress.step(name):
                        load = closed_loop.threads(opened[key].run, [rows], 1)
                    load.raise_errors()
                    if number:
                        durations_s.setdefault(key, []).append(load.seconds)
    return {key: len(texts) / statistics.median(listed) for key, listed in durations_s.items()}


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


def _conclusion(wanted: Sequence[Engine], figures: tables.Medians) -> list[str]:
    columns = "engine|one: p50, p99 ms|1000: texts/s|×|32: texts/s|start s|cosine|alone|holds"
    return report.table(
        columns.split("|"), [_engine(engine, figures, wanted[0]) for engine in wanted]
    )


def _details(device: str, steps: Mapping[str, Steps], extent: Extent) -> list[str]:
    return [
        f"Medians of {extent.rounds} rounds, asked in turn, after one that warms. *one*: single "
        "texts of mixed length, one after the other. *1000*: mixed texts in one call. *32*: single "
        "texts, so many at a time. ×: to sentence-transformers on the same device. *cosine*: mean, "
        "to sentence-transformers in FP32 on the CPU. *alone*: lowest, of a text alone to the same "
        "text in a batch.",
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
    runtime = f"onnxruntime {onnxruntime.__version__}"
    if device == CPU:
        return f"{runtime}, no GPU."
    import torch

    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {runtime}."


def _engine(engine: Engine, figures: tables.Medians, rival: Engine) -> list[str]:
    single = figures[engine.name, ONE]
    together, theirs = figures[engine.name, TOGETHER], figures[rival.name, TOGETHER]
    many, compared = figures[engine.name, MANY], figures[engine.name, "vectors"]
    bar = towers.BARS[engine.precision]
    holds = compared["mean_cosine"] >= bar.mean_cosine and compared["invariance"] >= bar.invariance
    return [
        engine.name,
        f"{single['p50_ms']:.1f}, {single['p99_ms']:.1f}",
        f"{together['count'] / together['seconds']:.0f}",
        f"{theirs['seconds'] / together['seconds']:.1f}",
        f"{many['count'] / many['seconds']:.0f}",
        f"{figures[engine.name, 'process']['cold_start_s']:.1f}",
        f"{compared['mean_cosine']:.6f}",
        f"{compared['invariance']:.6f}",
        "" if engine is rival else "yes" if holds else "**no**",
    ]


def _placed(precision: str, model: Path, device: str) -> list[str]:
    lines = []
    for provider, nodes in placed(model, device).items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in nodes.most_common())
        lines.append(f"- {precision}, {provider}: {nodes.total()} nodes. {kinds}".rstrip())
    return lines


def _packed(steps: Mapping[str, Steps], device: str, extent: Extent) -> list[str]:
    rates = {precision: packing(of, device, extent) for precision, of in steps.items()}
    return [
        "",
        "## Several texts a row",
        "",
        f"Texts/s of {extent.texts} mixed texts in one call, by how they lie in the model's rows "
        "and by the most tokens of a run.",
        "",
        *report.table(
            ["precision", "rows", *(f"{budget} tokens" for budget in extent.budgets)],
            [
                [precision, kind, *(f"{of[kind, budget]:.0f}" for budget in extent.budgets)]
                for precision, of in rates.items()
                for kind in dict.fromkeys(kind for kind, _ in of)
            ],
        ),
    ]
