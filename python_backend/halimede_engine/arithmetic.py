"""Arithmetic: the number format in which the CPU computes a model's float operators.

FP16 weights are computed in bfloat16 by a CPU that has instructions for it, at twice the rate of
float32, and in float32 by any other. The build measures the one that it finds, and the config asks
for what the build measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

F32, BF16, INT8 = "f32", "bf16", "int8"
PROPERTY = "INFERENCE_PRECISION_HINT"
"""OpenVINO's property of the CPU device, and a parameter of the accelerator in config.pbtxt."""
CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""Flags in /proc/cpuinfo. OpenVINO emulates bfloat16 on a CPU with AVX-512 but without these: a
model then takes minutes, or hangs."""


def has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether this CPU has instructions for bfloat16."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return bool(BF16_FLAGS & set(flags.split()))


def properties(arithmetic: str) -> dict[str, str]:
    """The OpenVINO properties that ask for an arithmetic; float32 is OpenVINO's own choice here."""
    return {PROPERTY: BF16} if arithmetic == BF16 else {}


def is_missing(asked: Mapping[str, str]) -> bool:
    """Whether these OpenVINO properties ask for an arithmetic that this CPU lacks."""
    return asked.get(PROPERTY) == BF16 and not has_bf16()
