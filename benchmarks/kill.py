"""Kills a training run at random and lets it go on, then compares its last checkpoint with an unbroken run's, bit for bit.

python -m benchmarks.kill --config configs/digits.py:tiny --config.train.steps=200 --config.train.save_every=5 --kills 20
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np

from sfjax.checkpoint import Checkpoints, flatten
from sfjax.config import read_config, split_overrides
from sfjax.errors import Parser, UserError, command
from sfjax.runlog import make_folder, run_record, write_json_atomic
from sfjax.training import task


def _start(config: str, overrides: dict, workdir: pathlib.Path) -> subprocess.Popen:
  flags = [f"--config.{key}={value}" for key, value in overrides.items()]
  line = [sys.executable, "train.py", "--config", config, "--workdir", str(workdir), *flags]
  env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "programs")}
  with (workdir.parent / f"{workdir.name}.log").open("a") as log:
    return subprocess.Popen(line, stdout=log, stderr=log, env=env)


def _steps(workdir: pathlib.Path) -> int:
  """Lines of metrics, each some steps."""
  file = workdir / "metrics.jsonl"
  return len(file.read_text().splitlines()) if file.exists() else 0


@command
def main(argv: list[str]) -> None:
  """Runs both, and writes DIR/kill.json."""
  rest, overrides = split_overrides(argv)
  p = Parser(prog="python -m benchmarks.kill", description=__doc__.splitlines()[0])
  p.add_argument("--config", default="configs/digits.py:tiny", metavar="FILE[:VARIANT]")
  p.add_argument("--kills", type=int, default=20)
  p.add_argument("--seed", type=int, default=0, help="of the moments")
  p.add_argument("--out", default="out/kill", help="an empty folder")
  a = p.parse_args(rest)
  out = make_folder(a.out, "--out")
  unbroken, broken = out / "unbroken", out / "broken"
  if unbroken.exists() or broken.exists():
    raise UserError(f"--out: {out} holds runs already")
  if _start(a.config, overrides, unbroken).wait():
    raise UserError(f"--config: the unbroken run failed; see {out / 'unbroken.log'}")
  draw, kills, moments = random.Random(a.seed), 0, []
  while kills < a.kills:
    before, run, began = _steps(broken), _start(a.config, overrides, broken), time.monotonic()
    if kills % 2:  # at work
      while run.poll() is None and _steps(broken) <= before:
        time.sleep(0.02)
      time.sleep(draw.expovariate(1 / 2.0))
    else:  # anywhere: while it starts, restores, compiles
      time.sleep(draw.uniform(0, 30))
    if run.poll() is not None:
      if run.returncode:
        raise RuntimeError(f"the run failed after {kills} kills; see {out / 'broken.log'}")
      raise UserError(f"--kills: the run was done after {kills} of {a.kills} kills; want more --config.train.steps")
    run.send_signal(signal.SIGKILL)
    run.wait()
    kills += 1
    moments.append({"seconds": round(time.monotonic() - began, 2), "lines": _steps(broken)})
    print(f"kill {kills}: {moments[-1]}", flush=True)
  if _start(a.config, overrides, broken).wait():
    raise RuntimeError(f"the last run failed; see {out / 'broken.log'}")
  config = read_config(a.config, overrides)
  like, ends = task(config).state(config), []
  for folder in (unbroken, broken):
    with Checkpoints(folder / "checkpoints") as checkpoints:
      ends.append(flatten(checkpoints.restore(like)[0]))
  differ = [name for name in ends[0] if not np.array_equal(ends[0][name], ends[1][name])]
  record = run_record({"config": a.config, "overrides": overrides}, kills=moments, arrays=len(ends[0]), differ=differ)
  write_json_atomic(out / "kill.json", record)
  print(f"{kills} kills; {len(ends[0]) - len(differ)} of {len(ends[0])} arrays equal, bit for bit")
  if differ:
    sys.exit(1)


if __name__ == "__main__":
  main(sys.argv[1:])
