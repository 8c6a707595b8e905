"""The ablation's figure: python -m benchmarks.ablation draws docs/ablation.png from docs/ablation.json.

One panel for prompts, one for hidden digits; every memory has its place and its colour in both, bars are 95 % intervals.
"""

import json
import pathlib

from sfjax.runlog import replacing

DOCS = pathlib.Path(__file__).parent.parent / "docs"
# Colours told apart by the colour-blind, too (Okabe and Ito), and what is compared with them in grey.
ARMS = {
  "shipped": "black",
  "full": "#0072B2",
  "attention importance": "#E69F00",
  "without local sparsity": "#009E73",
  "without P": "#D55E00",
  "window of the same bytes": "#CC79A7",
  "dense window": "#56B4E9",
  "training-free": "grey",
}
PANELS = (
  ("prompts, last second", "accuracy, last second", ("5 s", "20 s", "60 s")),
  ("hidden digits", "accuracy", ("hidden 3 chunks", "hidden 9 chunks", "hidden 18 chunks")),
)


def draw(results: list[dict], path: pathlib.Path) -> None:
  """results: arm, condition and metrics (value, low, high) of each, as in docs/ablation.json."""
  from matplotlib.figure import Figure

  found = {(r["arm"], r["condition"]): r["metrics"] for r in results}
  figure = Figure(figsize=(10, 3.6), layout="constrained")
  panels = figure.subplots(1, len(PANELS), sharey=True)
  for ax, (title, metric, conditions) in zip(panels, PANELS, strict=True):
    real = [found["real clips", c][metric]["value"] for c in conditions]
    ends = [[x + side * 0.4 for x in range(len(conditions))] for side in (-1, 1)]
    ax.hlines(real, *ends, color="grey", label="real clips")
    for i, (arm, colour) in enumerate(ARMS.items()):
      told = [found[arm, c][metric] for c in conditions]
      at = [x + (i - (len(ARMS) - 1) / 2) * 0.09 for x in range(len(conditions))]
      value = [m["value"] for m in told]
      reach = [[m["value"] - m["low"] for m in told], [m["high"] - m["value"] for m in told]]
      ax.errorbar(at, value, reach, fmt="o", color=colour, markersize=5, linewidth=1.5, label=arm)
    ax.set(title=title, ylim=(-0.02, 1.02), xticks=range(len(conditions)))
    ax.set_xticklabels([c.removeprefix("hidden ") for c in conditions])
    ax.grid(axis="y", alpha=0.3)
  panels[0].set_ylabel("digits named")
  figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
  with replacing(path) as part:
    figure.savefig(part, format="png", dpi=130)


if __name__ == "__main__":
  draw(json.loads((DOCS / "ablation.json").read_text())["results"], DOCS / "ablation.png")
