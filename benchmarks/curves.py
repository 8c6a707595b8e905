"""The stages' loss curves: python -m benchmarks.curves draws docs/training.png from docs/training.json.

That file holds, by stage, runs in the order in which they were made: {"run", "metrics": lines of its metrics.jsonl}. With
--add STAGE=NAME=WORKDIR a run's metrics are put there first.
"""

import json
import pathlib
import sys

from sfjax.errors import Parser, UserError, command
from sfjax.runlog import replacing

DOCS = pathlib.Path(__file__).parent.parent / "docs"
# What the panels show: a stage and one of its metrics. The last stage's legend has a place of its own.
PANELS = (
  (("bidirectional", "flow"), ("teacher_forcing", "flow"), ("ode", "x0_error"), ("ode", "importance")),
  (("self_forcing", "critic_loss"), ("self_forcing", "direction"), ("self_forcing", "importance"), None),
)
STAGES = tuple(dict.fromkeys(panel[0] for row in PANELS for panel in row if panel))
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "grey", "black")


def kept(metrics: list[dict], stage: str) -> list[dict]:
  """What the figure needs of a run's metrics, to four digits."""
  names = [panel[1] for row in PANELS for panel in row if panel and panel[0] == stage]
  return [{"step": m["step"]} | {name: float(f"{m[name]:.4g}") for name in names if name in m} for m in metrics]


def draw(stages: dict[str, list[dict]], path: pathlib.Path) -> None:
  """stages: as in docs/training.json; a line a run."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(13, 5.6), layout="constrained")
  rows, lines = figure.subplots(len(PANELS), len(PANELS[0])), ()
  for ax, panel in zip(rows.flat, (panel for row in PANELS for panel in row), strict=True):
    if panel is None:
      ax.axis("off")
      ax.legend(*lines, loc="center left", fontsize="small", frameon=False)
      continue
    stage, name = panel
    for i, run in enumerate(stages[stage]):
      style = dict(color=COLOURS[i % len(COLOURS)], linestyle=("-", "--", ":", "-.")[i // len(COLOURS)])
      told = [(m["step"], m[name]) for m in run["metrics"] if name in m]
      ax.plot(*zip(*told, strict=True), **style, linewidth=1.2, label=run["run"])
    ax.set(title=f"{stage}: {name}", xlabel="step", ylim=(0, None))
    ax.grid(alpha=0.3)
    lines = ax.get_legend_handles_labels()
  with replacing(path) as part:
    figure.savefig(part, format="png", dpi=100)


@command
def main(argv: list[str]) -> None:
  p = Parser(prog="python -m benchmarks.curves", description=__doc__.splitlines()[0])
  p.add_argument(
    "--add", action="append", default=[], metavar="STAGE=NAME=WORKDIR", help="a run to put into the record"
  )
  a = p.parse_args(argv)
  record = DOCS / "training.json"
  stages = json.loads(record.read_text())
  for text in a.add:
    stage, _, rest = text.partition("=")
    name, _, folder = rest.rpartition("=")
    if stage not in STAGES or not name or not (lines := pathlib.Path(folder) / "metrics.jsonl").is_file():
      raise UserError(
        f"--add: {text!r}; want STAGE=NAME=WORKDIR, STAGE one of {', '.join(STAGES)}, with a metrics.jsonl"
      )
    metrics = kept([json.loads(line) for line in lines.read_text().splitlines()], stage)
    stages[stage] = [run for run in stages[stage] if run["run"] != name] + [{"run": name, "metrics": metrics}]
  with replacing(record) as part:
    part.write_text(json.dumps(stages) + "\n")
  draw(stages, DOCS / "training.png")


if __name__ == "__main__":
  main(sys.argv[1:])
