"""How `benchmarks.realtime` shows what it measured: a table, a line a memory and length, and chunk times against video time."""

import pathlib

from sfjax.data.digits import first_frame
from sfjax.flow import SamplerConfig
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig
from sfjax.runlog import replacing

_COLUMNS = (
  "memory", "video s", "FPS denoiser", "FPS with VAE", "chunk ms, p50 / p95", "with VAE ms, p50 / p95", "late / early",
  "first frames s", "K/V GB", "held GB, predicted / measured", "peak GB, predicted / measured",
)  # fmt: skip
HEADER = f"| {' | '.join(_COLUMNS)} |\n" + "|---" * len(_COLUMNS) + "|"


def _joined(cells: list[str]) -> str:
  return f"| {' | '.join(cells)} |"


def _gb(n: int | None) -> str:
  return "" if n is None else f"{n / 1e9:.2f}"


def _ms(x: dict) -> str:
  return f"{x['p50'] * 1e3:.0f} / {x['p95'] * 1e3:.0f}"


def _name(made: dict) -> str:
  """The memory of a run or row, and the options that are not the defaults."""
  usual = {"routing": SamplerConfig.routing, "commit": SamplerConfig.commit}
  usual |= {"slots": MemoryConfig.slots, "linear": ModelConfig.linear}
  changed = [name for name, value in usual.items() if made[name] != value]
  return ", ".join([made["attention"], *(f"{name} {made[name]}" for name in changed)])


def line(row: dict, run: dict) -> str:
  """A row of the table; run: the memory's run, of the longest video that fits."""
  head = [_name(row), f"{row['seconds']:.3g}"]
  kv, held = _gb(row["kv_bytes"]), _gb(row["total_bytes"])
  if not row["measured"]:
    return _joined([*head, "does not fit", *[""] * 5, kv, held, ""])
  speed = [f"{row['fps_denoiser']:.1f}", f"{row['fps_end_to_end']:.1f}", _ms(row["denoiser"]), _ms(row["end_to_end"])]
  speed += [f"{row['late_over_early']:.3f}", f"{run['first_frames_s']:.2f}"]
  if row["chunks"] < len(run["chunk_times_s"]):  # the bytes measured are those of the longest
    return _joined([*head, *speed, kv, held, ""])
  told, peak = run["device_bytes"], run["peak_memory"]
  return _joined(
    [*head, *speed, kv, f"{held} / {_gb(told['live'])}", f"{_gb(peak['predicted'])} / {_gb(peak['device'])}"]
  )


def peer_line(row: dict, fps: float) -> str:
  """A row of the table for Self-Forcing."""
  times = sorted(row["chunk_times_s"])
  spread = _ms({"p50": times[len(times) // 2], "p95": times[int(0.95 * (len(times) - 1) + 0.5)]})
  speed = [f"{row['fps_denoiser']:.1f}", f"{row['fps_end_to_end']:.1f}", spread, "", "", ""]
  name = f"Self-Forcing, {row['cache']}"
  return _joined(
    [name, f"{row['frames'] / fps:.3g}", *speed, _gb(row["kv_bytes"]), "", f" / {_gb(row['peak_memory'])}"]
  )


def plot(runs: list[dict], peers: list[dict], fps: float, path: pathlib.Path) -> None:
  """Milliseconds of every chunk against the time in the video at which it ends, without and with the VAE."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 4), layout="constrained")
  panels = figure.subplots(1, 2, sharey=True)
  ends = lambda times: [first_frame(i + 1) / fps for i in range(len(times))]
  for i, (ax, title) in enumerate(zip(panels, ("denoiser alone", "with the VAE"), strict=True)):
    for run in runs:
      times = [t[i] * 1e3 for t in run["chunk_times_s"]]
      ax.plot(ends(times)[1:], times[1:], label=_name(run))
    ax.set(title=title, xlabel="seconds of video")
  for row in peers:
    times = [t * 1e3 for t in row["chunk_times_s"]]
    panels[0].plot(ends(times)[1:], times[1:], "--", label=f"Self-Forcing, {row['cache']}")
  panels[0].set_ylabel("milliseconds a chunk")
  panels[0].set_ylim(bottom=0)  # when all is drawn: it ends the search for limits
  if runs or peers:
    panels[0].legend(fontsize="small")
  with replacing(path) as part:
    figure.savefig(part, format="png", dpi=150)
