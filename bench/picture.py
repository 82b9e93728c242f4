"""Draw docs/growth.svg from docs/data: what an ALLOC and DEALLOC cost while other grants are live, Linux's and ours.

    python bench/picture.py

Each curve is shown as a multiple of its own cost with nothing live: the two were measured on different machines (the
real driver under emulation), so only the shapes can be compared. Needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
CURVES = (("growth-linux.json", "#b4431c", "Linux's driver"), ("growth-ours.json", "#1c6cb4", "gntalloc"))


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "gntalloc"  # the same bytes for the same data
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for name, colour, label in CURVES:
        measured = json.loads((DOCS / "data" / name).read_text())
        points = measured["points"]
        first = points[0]["microseconds"]
        live = [point["live"] for point in points]
        axes.plot(live, [point["microseconds"] / first for point in points], "o-", color=colour, markersize=4)
        last = points[-1]["microseconds"] / first
        axes.annotate(f"{label}: {last:.2f}", (live[-1], last), (-6, 8), textcoords="offset points", ha="right")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("other grants live")
    axes.set_ylabel("cost of ALLOC + DEALLOC,\nas a multiple of the first point")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(DOCS / "growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
