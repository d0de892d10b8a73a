"""The picture of a report. This is run as a file in an environment that has matplotlib."""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib.pyplot as plt  # type: ignore[import-not-found]

CASES = {"1000": "1000 texts in one call", "concurrency 32": "single texts, 32 at a time"}
COLOURS = {"halimede": "#d55e00", "limit": "#bbbbbb"}


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """One panel a case: texts a second of every engine that has it."""
    plt.rcParams["svg.hashsalt"] = "halimede"
    figure, panels = plt.subplots(1, len(CASES), figsize=(13, 0.34 * len(rows) + 1), sharey=True)
    for panel, (case, title) in zip(panels, CASES.items(), strict=True):
        rates = [row["rates"].get(case, 0.0) for row in rows]
        names = [row["engine"] for row in rows]
        colours = [COLOURS.get(name.split(",")[0], "#4477aa") for name in names]
        bars = panel.barh(names, rates, color=colours)
        panel.bar_label(bars, [f"{rate:.0f}" if rate else "" for rate in rates], padding=3)
        panel.set_title(f"{title}, texts/s")
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.load(sys.stdin), sys.argv[1])
