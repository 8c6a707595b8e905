"""Measures every configuration of the Hopper kernels that fits, and writes the winners to a file by device.

python -m pallas_kernels.pbsa.tune --head_dim 128 --kv_valid 60 64

The problem is Sparse Forcing's at 832x480, a block a tile of 3 x 5 x 4 tokens: 39 query tiles, 60 blocks of P and 59 listed of
234, 12 heads of 128 or 24 of 64.
The three kernels do not depend on each other's parameters, so each is searched for itself.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pbsa.lists import BLOCK, TILE, transpose_lists
from pallas_kernels.pbsa.mosaic_sm90_backward import backward_kv, backward_q
from pallas_kernels.pbsa.mosaic_sm90_config import KERNELS, Config, fits, heuristic, tuned_file
from pallas_kernels.pbsa.mosaic_sm90_forward import forward
from pallas_kernels.pbsa.mosaic_sm90_parts import LOG2E, Call
from pallas_kernels.pbsa.timing import random_lists, timed

TILES, BLOCKS, PREFIX, LISTED, WIDTH = 39, 294, 60, 59, 1536


def candidates(kernel: str, head_dim: int, kv_valid: int) -> list[Config]:
  """What is tried for a kernel: the heuristic with every choice of the kernel's own parameters that fits."""
  names, choices = zip(*KERNELS[kernel].items(), strict=True)
  start = heuristic(head_dim, kv_valid)
  every = [dataclasses.replace(start, **dict(zip(names, c, strict=True))) for c in itertools.product(*choices)]
  return [c for c in every if fits(c, head_dim, kv_valid, kernel)]


def kernels(head_dim: int, kv_valid: int):
  """Random inputs, and by kernel a function Call -> a compiled call without arguments."""
  heads = WIDTH // head_dim
  ids, counts = map(jnp.asarray, random_lists(np.random.default_rng(0), (1, heads, TILES), BLOCKS, PREFIX, LISTED))
  prefix = jnp.full((1,), PREFIX, jnp.int32)
  sizes = TILES * TILE, BLOCKS * BLOCK, BLOCKS * BLOCK, TILES * TILE
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, size: jax.random.normal(key, (1, size, heads, head_dim), jnp.bfloat16)
  q, k, v, dout = (draw(*x) for x in zip(keys, sizes, strict=True))
  call = Call(head_dim**-0.5, kv_valid, None, heuristic(head_dim, kv_valid))
  out, lse, _ = jax.jit(lambda *x: forward(call, *x))(q, k, v, None, ids, counts, prefix)
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
  rows = dout, lse * LOG2E, delta
  tiles, readers = jax.jit(transpose_lists, static_argnums=3)(ids, counts, PREFIX, BLOCKS)

  def compiled(f, *x):
    run = jax.jit(f).lower(*x).compile()
    return lambda: run(*x)

  return {
    "forward": lambda c: compiled(lambda *x: forward(c, *x), q, k, v, None, ids, counts, prefix),
    "dq": lambda c: compiled(lambda *x: backward_q(c, *x), q, k, v, None, ids, counts, prefix, *rows),
    "dkv": lambda c: compiled(lambda *x: backward_kv(c, 0, *x), q, k, v, None, tiles, readers, prefix, *rows),
  }


def tune(head_dim: int, kv_valid: int, runs: int) -> dict:
  """The entry of a device's file for one head dim and number of valid slots: the winners, and every time measured."""
  best, measured = {}, {}
  for kernel, compiled in kernels(head_dim, kv_valid).items():
    times = {}
    tried = candidates(kernel, head_dim, kv_valid)
    with ThreadPoolExecutor() as pool:
      calls = [pool.submit(compiled, Call(head_dim**-0.5, kv_valid, None, config)) for config in tried]
    for config, call in zip(tried, calls, strict=True):
      own = {name: getattr(config, name) for name in KERNELS[kernel]}
      label = ", ".join(f"{name} {value}" for name, value in own.items())
      try:
        times[label] = timed(call.result(), jax.block_until_ready, runs)["ms"]
      except Exception as e:  # what does not compile cannot win
        times[label] = f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
        continue
      if times[label] <= min(x for x in times.values() if not isinstance(x, str)):
        best |= own
      print(f"head_dim {head_dim}, kv_valid {kv_valid}, {label}: {times[label]:.4f} ms", flush=True)
    measured[kernel] = times
  config = dataclasses.asdict(heuristic(head_dim, kv_valid)) | best
  return {"head_dim": head_dim, "kv_valid": kv_valid, "config": config, "ms": measured}


def write(path: pathlib.Path, device: str, entries: list[dict]) -> None:
  """Puts entries into a device's file, in place of those for the same problem."""
  old = json.loads(path.read_text())["entries"] if path.exists() else []
  key = lambda e: (e["head_dim"], e["kv_valid"])
  new = {key(e): e for e in old} | {key(e): e for e in entries}
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(".part")
  record = {"device": device, "jax": jax.__version__, "entries": [new[k] for k in sorted(new)]}
  part.write_text(json.dumps(record, indent=1) + "\n")
  os.replace(part, path)


def main(argv: list[str]) -> int:
  """Tunes, prints every time, and writes the device's file after each problem."""
  p = argparse.ArgumentParser(prog="python -m pallas_kernels.pbsa.tune", description=__doc__.splitlines()[0])
  p.add_argument("--head_dim", type=int, nargs="+", choices=(64, 128), default=[128])
  p.add_argument("--kv_valid", type=int, nargs="+", metavar="1..64", default=[60], help="valid slots of a block")
  p.add_argument("--runs", type=int, default=5, help="timed bursts a configuration; the median counts")
  p.add_argument("--out", type=pathlib.Path, help="file to write; default: the one that is read on this device")
  a = p.parse_args(argv)
  for name, bad in (("kv_valid", [v for v in a.kv_valid if not 1 <= v <= BLOCK]), ("runs", [a.runs] * (a.runs < 1))):
    if bad:
      p.exit(2, f"--{name}: {bad[0]}; want {f'1..{BLOCK}' if name == 'kv_valid' else '1 or more'}\n")
  device = jax.devices()[0]
  if getattr(device, "compute_capability", None) != "9.0":
    p.exit(2, f"tune: wants a Hopper GPU, not {device.device_kind}\n")
  path = a.out or tuned_file(device.device_kind)
  for head_dim, kv_valid in itertools.product(a.head_dim, a.kv_valid):
    entry = tune(head_dim, kv_valid, a.runs)
    write(path, device.device_kind, [entry])
    print(f"head_dim {head_dim}, kv_valid {kv_valid}: {entry['config']}", flush=True)
  print(f"wrote {path}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
