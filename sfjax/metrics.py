"""Training metrics: one line on stdout, one in metrics.jsonl, one point in TensorBoard, and a progress bar."""

import json
import pathlib
import sys

from tensorboardX import SummaryWriter
from tqdm import tqdm

from sfjax.runlog import replacing


def _lines_up_to(path: pathlib.Path, step: int) -> list[str]:
  kept = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, KeyError, TypeError):
      continue  # half a line, from a run that was killed while it wrote
  return kept


class MetricWriter:
  """Writes to a working folder. A resumed run's file reads like an unbroken one.

  Args:
    workdir: holds metrics.jsonl and tb/. total: steps of the run. start: step it resumes at; later lines are dropped.
  """

  def __init__(self, workdir, total: int, start: int = 0):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    kept = _lines_up_to(path, start) if path.exists() else []
    with replacing(path) as part:
      part.write_text("".join(kept))
    self._file = path.open("a")
    self._board = SummaryWriter(str(pathlib.Path(workdir) / "tb"), purge_step=start + 1)
    self._bar = tqdm(total=total, initial=start, unit="step", file=sys.stderr, disable=not sys.stderr.isatty())

  def advance(self, steps: int = 1) -> None:
    """Moves the progress bar."""
    self._bar.update(steps)

  def write(self, step: int, values: dict[str, float]) -> None:
    """One record of scalars."""
    values = {name: float(value) for name, value in values.items()}
    tqdm.write(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()
    self._file.close()
    self._board.close()
