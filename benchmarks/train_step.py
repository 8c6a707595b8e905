"""Time of a training step in every stage of a config, and how many steps fit in a given time.

python -m benchmarks.train_step --config configs/digits.py:base --seconds 500
"""

import argparse
import json
import sys
import time

import jax
import numpy as np

from sfjax import cluster, training
from sfjax.config import read_config, split_overrides
from sfjax.data.loader import make_loader


def main(argv: list[str]) -> None:
  rest, overrides = split_overrides(argv)
  p = argparse.ArgumentParser(description=__doc__)
  p.add_argument("--config", required=True)
  p.add_argument("--seconds", type=float, default=600)
  p.add_argument("--steps_file", help="write the number of steps that fit here")
  p.add_argument("--trace", help="write a profile of three steps of every stage into this folder")
  a = p.parse_args(rest)
  config = training.with_batches(read_config(a.config, overrides))
  task, mesh = training.task(config), cluster.make_mesh(config.train.fsdp, config.train.tensor, config.train.context)
  mean, start, compile_total = 0.0, 0.0, 0.0
  for stage in config.train.stages:
    state, fixed = task.state(config, mesh), task.fixed(config, mesh)
    where = training.where_kept(config, mesh, state)
    state = jax.device_put(state, where)
    loaders = [make_loader(task.source(config, part), part.batch, 0) for part in stage.parts]
    batches = [
      (task.inputs(config, next(loader)), cluster.places(part.batch))
      for loader, part in zip(loaders, stage.parts, strict=True)
    ]
    batches = cluster.share(mesh, batches)
    step = training.jitted_step(config, stage, mesh, where)
    began = time.perf_counter()
    state, m = step(state, fixed, batches)
    m["loss"].block_until_ready()
    compiled = time.perf_counter() - began
    times = []
    for _ in range(6):
      began = time.perf_counter()
      state, m = step(state, fixed, batches)
      m["loss"].block_until_ready()
      times.append(time.perf_counter() - began)
    if a.trace:
      with jax.profiler.trace(f"{a.trace}/stage{stage.chunks}"):
        for _ in range(3):
          state, m = step(state, fixed, batches)
        m["loss"].block_until_ready()
    ms = float(np.median(times)) * 1e3
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    row = dict(chunks=stage.chunks, batch=stage.batch, dense=stage.dense, step_ms=ms, compile_s=compiled, peak_gib=peak)
    print(json.dumps({k: round(v, 1) for k, v in row.items()}), flush=True)
    mean += (stage.until - start) * ms / 1e3
    start, compile_total = stage.until, compile_total + compiled
  steps = int((a.seconds - 0.5 * compile_total) / (mean * 1.04))
  print(f"{steps} steps fit in {a.seconds:.0f} s")
  if a.steps_file:
    with open(a.steps_file, "w") as f:
      f.write(str(max(steps, 1)))


if __name__ == "__main__":
  main(sys.argv[1:])
