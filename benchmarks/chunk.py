"""Where a chunk's time goes: the chunk's program alone, on random weights at full size; then under the profiler, by stage.

python -m benchmarks.chunk --config configs/wan_1_3b.py --out out/chunk [--config.memory.persistent=60 ..]

The memory is full before anything is timed, chunks follow each other without a pause, and the GPU's power and clocks are read
beside them (nvidia-smi), since power is what bounds it. Then a few chunks are profiled: "busy" is the time in which some
kernel ran, "gaps" the rest of the profiled span; a stage's time is the sum of its kernels', of which some run beside others.

--devices N shares the tokens of the chunk among N devices; power, clocks and kernels are the first one's.

Stages: "products" by cuBLAS and `gelu_linear`, "pbsa", "slots" (norm, RoPE and the write into the memory), "cross-attention",
"lists" (what tiles read), "memory" (P and scores, once a chunk), "layers" (all else there: norms, modulation, residuals),
"exchange" (between devices, waiting for one another included) and "copies".
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.realtime import random_text, random_weights
from sfjax import cluster, rollout
from sfjax.config import read_config, split_overrides, to_dict
from sfjax.errors import Parser, check_flags, command
from sfjax.runlog import keep_programs, latency, make_folder, run_record, write_json_atomic

KERNELS = (  # by name, what XLA did not write itself
  ("nccl", "exchange"),
  ("pbsa", "pbsa"),
  ("to_slots", "slots"),
  ("few_keys|fmha|flash", "cross-attention"),
  ("nvjet|cutlass|gemm|cublas|gelu_linear", "products"),
  ("add_norm", "layers"),
  ("memcpy|memset|copy", "copies"),
)
SCOPES = ("lists", "memory", "layers")  # of `jax.named_scope` in the package


def scopes(hlo: str) -> dict[str, str]:
  """Of each instruction of a compiled program, by the name that its kernel has: the innermost scope that it is in."""
  found = {}
  for name, op in re.findall(r"%?([\w.\-]+) = [^\n]*?op_name=\"([^\"]*)\"", hlo):
    inside = [part for part in op.split("/") if part in SCOPES]
    if inside:
      found[re.sub(r"[.\-]", "_", name)] = inside[-1]
  return found


def stage_of(kernel: str, inside: dict[str, str]) -> str:
  """A kernel's stage."""
  for pattern, stage in KERNELS:
    if re.search(pattern, kernel, re.IGNORECASE):
      return stage
  return next((inside[name] for name in (kernel, kernel.rsplit("_", 1)[0]) if name in inside), "other")


def by_stage(events: list[tuple[str, float, float]], inside: dict[str, str], chunks: int) -> dict:
  """Milliseconds a chunk. events: (kernel, begin, duration) in nanoseconds, of so many chunks."""
  stages, kernels, counts = (collections.Counter() for _ in range(3))
  busy = reached = 0.0
  for kernel, begin, duration in sorted(events, key=lambda e: e[1]):
    end = begin + duration
    busy, reached = busy + max(0.0, end - max(begin, reached)), max(reached, end)
    stages[stage_of(kernel, inside)] += duration
    kernels[kernel] += duration
    counts[kernel] += 1
  ms = 1 / 1e6 / chunks
  span = reached - min((e[1] for e in events), default=0.0)
  told = lambda name: {
    "name": name,
    "stage": stage_of(name, inside),
    "ms": kernels[name] * ms,
    "times": counts[name] / chunks,
  }
  return {
    "busy_ms": busy * ms,
    "gaps_ms": (span - busy) * ms,
    "kernels": len(events) / chunks,
    "stages_ms": {stage: t * ms for stage, t in stages.most_common()},
    "longest": [told(name) for name, _ in kernels.most_common(40)],
  }


def gpu_events(folder: str) -> list[tuple[str, float, float]]:
  """(kernel, begin, duration) of what ran on the first GPU, of a trace that `jax.profiler` wrote."""
  (file,) = pathlib.Path(folder).glob("**/*.xplane.pb")
  planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes if "GPU" in plane.name}
  lines = planes[min(planes)].lines if planes else []
  return [(e.name, e.start_ns, e.duration_ns) for line in lines if line.name.startswith("Stream") for e in line.events]


class Watched:
  """Power in W and clock in MHz of the first GPU while the block runs, every 50 ms; nothing where nvidia-smi is not."""

  def __enter__(self):
    self.samples, self._smi = [], None
    first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]  # nvidia-smi counts all there are
    query = ["nvidia-smi", "-i", first, "--query-gpu=power.draw.instant,clocks.sm", "--format=csv,noheader,nounits"]
    try:
      self._smi = subprocess.Popen([*query, "-lms", "50"], stdout=subprocess.PIPE, text=True)
    except OSError:
      return self
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()
    return self

  def _read(self):
    for row in self._smi.stdout:
      numbers = re.findall(r"[\d.]+", row)
      if len(numbers) == 2:
        self.samples.append([float(x) for x in numbers])

  def __exit__(self, *error):
    if self._smi:
      self._smi.terminate()
      self._reader.join(1)

  def medians(self) -> dict[str, float]:
    return dict(zip(("watts", "mhz"), np.median(self.samples, 0).tolist(), strict=True)) if self.samples else {}


@command
def main(argv: list[str]) -> None:
  """Times and profiles the chunk's program and writes DIR/chunk.json."""
  rest, overrides = split_overrides(argv)
  p = Parser(prog="python -m benchmarks.chunk", description=__doc__.splitlines()[0])
  p.add_argument("--config", default="configs/wan_1_3b.py", metavar="FILE[:VARIANT]")
  p.add_argument("--chunks", type=int, default=40, help="timed, with a full memory")
  p.add_argument("--devices", type=int, default=1, help="that share the tokens of the chunk")
  p.add_argument("--words", type=int, default=40, help="rows of the prompt")
  p.add_argument("--profiled", type=int, default=3, help=argparse.SUPPRESS)
  p.add_argument("--out", default="out/chunk")
  a = p.parse_args(rest)
  config = read_config(a.config, overrides)
  check_flags(a, ("chunks", 1, 10_000), ("words", 0, config.model.text_len))
  out = make_folder(a.out, "--out")
  keep_programs()
  model, memory = dataclasses.replace(config.model, param_dtype=config.model.dtype), config.memory
  mesh = cluster.tokens_mesh(a.devices, model)
  programs = rollout.Compiled(model, memory, config.sampler, mesh)
  params = random_weights(cluster.laid_out(mesh, rollout.abstract_params(model)), 0)
  text = random_text(model, a.words, 3)
  m, key, sample = programs.start(params, text, jnp.int32(0), None), jax.random.key(1), jnp.zeros((1,), jnp.int32)
  known = jnp.zeros((1, model.chunk_frames, *model.latent_size, model.latent_channels))
  frames = jnp.zeros((model.chunk_frames,), bool)
  everywhere = mesh and NamedSharding(mesh, PartitionSpec())
  key, sample, known, frames = jax.device_put((key, sample, known, frames), everywhere)
  began = time.perf_counter()
  chunk = programs.chunk.lower(params, m, key, sample, known, frames).compile()
  compiled = time.perf_counter() - began

  def play(m, chunks):
    """(the memory, the time at which each chunk was there): the next one is always asked for before."""
    times, before = [], None
    for _ in range(chunks):
      x, m = chunk(params, m, key, sample, known, frames)
      if before is not None:
        before.block_until_ready()
        times.append(time.perf_counter())
      before = x
    before.block_until_ready()
    if not bool(jnp.isfinite(before).all()):
      raise RuntimeError("latents are not finite")
    return m, [*times, time.perf_counter()]

  full = memory.window + -(-memory.persistent // max(1, model.layout.whole_blocks))
  m, _ = play(m, full + 2)
  with Watched() as watched:
    m, times = play(m, a.chunks + 1)
  found = {"compile_s": compiled, "chunk": latency(np.diff(times).tolist())} | watched.medians()
  print(
    f"{jax.devices()[0].device_kind}: {found['chunk']['p50'] * 1e3:.1f} ms a chunk",
    *map(str, watched.medians().items()),
  )
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      play(m, a.profiled)
    events = gpu_events(folder)
  if events:
    found |= by_stage(events, scopes(chunk.as_text()), a.profiled)
    print(f"busy {found['busy_ms']:.1f} ms, gaps {found['gaps_ms']:.1f} ms, {found['kernels']:.0f} kernels; by stage:")
    for stage, ms in found["stages_ms"].items():
      print(f"{ms:8.2f} ms  {stage}")
  write_json_atomic(out / "chunk.json", run_record(to_dict(config), flags=vars(a), **found, protocol=__doc__))


if __name__ == "__main__":
  main(sys.argv[1:])
