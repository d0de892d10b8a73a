"""The limit: the time that this machine's best matrix products need for a model's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from halimede_engine import cores
from halimede_ops import spec, text
from halimede_tools.bench.peers import engines
from halimede_tools.settings import Settings


class Work(NamedTuple):
    """Operations of one text of L tokens: `token * L + pair * L * L`, exact for a transformer."""

    token: float
    pair: float

    def operations(self, lengths: Sequence[int]) -> float:
        """Of texts of these lengths, none padded."""
        return sum(self.token * length + self.pair * length * length for length in lengths)


def work(settings: Settings, model: str) -> Work:
    """What PyTorch counts in the model's matrix products at two lengths."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    source = settings.home / "models" / model / "source"
    opened = AutoModel.from_pretrained(source, attn_implementation="eager").eval()

    def counted(length: int) -> float:
        import torch

        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            opened(input_ids=torch.ones(1, length, dtype=torch.int64))
        return float(counter.get_total_flops())

    short, long = 16, 128
    pair = (counted(long) / long - counted(short) / short) / (long - short)
    return Work(counted(short) / short - pair * short, pair)


def lengths(settings: Settings, model: str, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, cut at the model's limit."""
    folder = settings.home / "models" / model / "fp32"
    tokenizer = text.load(folder, spec.load(folder))
    return [len(row.ids) for row in tokenizer.encode(list(texts), [None] * len(texts))]


def rates(settings: Settings, model: str) -> dict[str, dict[str, float]]:
    """Operations a second that this machine reaches: precision → library → rate."""
    source = settings.home / "models" / model / "source"
    sizes = json.loads((source / "config.json").read_text())
    python: Path = engines.python("sentence-transformers", settings)
    command = [str(python), str(Path(__file__).with_name("matrix.py"))]
    arguments = [sizes["hidden_size"], sizes["intermediate_size"], cores.available()]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    measured: dict[str, dict[str, float]] = json.loads(done.stdout)
    return measured
