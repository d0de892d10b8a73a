"""The GPU check: what it refuses, and its comparison, run for real on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from conftest import MODEL, ROOT, free_options

from halimede_tools.bench import gpu
from halimede_tools.bench.peers import compare
from halimede_tools.build import towers
from halimede_tools.settings import Settings

SMALL = gpu.Extent(
    rounds=1,
    cases=(
        compare.Case(gpu.ONE, "each", "single", 8),
        compare.Case(gpu.TOGETHER, "together", "mixed", 16),
        compare.Case(gpu.MANY, "each", "single", 16, 8),
    ),
    texts=16,
    budgets=(512, 4096),
)
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.mark.skipif(HAS_CUDA, reason="this machine's onnxruntime has CUDA")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_machine_without_a_gpu_is_told_what_it_lacks(device: str) -> None:
    """One line on stderr and exit code 1; it names the package that brings the provider."""
    command = [sys.executable, "-m", "halimede", "bench", "gpu", "--device", device]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no GPU check for {device} here: ")
    assert "pip install onnxruntime-gpu" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("sole_build")
def test_the_comparison_runs_on_the_cpu(settings: Settings, tmp_path: Path) -> None:
    """INT8 in process and on a Triton of its own: figures, vectors within their bar, providers."""
    port = free_options().http_port
    report = gpu.gpu_check(settings, MODEL, ["int8"], "cpu", SMALL, tmp_path, port)
    assert report == tmp_path / "gpu-cpu.md"
    rows = [line.split(" | ") for line in report.read_text().splitlines() if ", int8 |" in line]
    assert [row[0] for row in rows] == [
        "| halimede, in process, cpu, int8",
        "| halimede, Triton, cpu, int8",
    ]
    for row in rows:
        assert row[-1] == "yes |"
        assert float(row[6]) >= towers.BARS["int8"].mean_cosine
        assert float(row[2]) > 0
    told = report.read_text()
    assert "- int8, OpenVINOExecutionProvider: " in told
    assert "- int8, CPUExecutionProvider: 0 nodes" in told
    assert "| int8 | packed | " in told
    assert "| int8 | apart | " in told
