"""The feed-forward's first half, gelu(x W + b), by each implementation: microseconds, power and energy of a call.

python -m benchmarks.gelu_linear --config configs/wan_1_3b.py --out out/gelu_linear

Rows are a chunk's tokens; a call takes the next of several layers' weights, so that they come from memory as they do in a
model. Implementations take turns, each long enough to reach the GPU's power limit, since that is what bounds a chunk.
"product" is x W alone.
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.chunk import Watched
from pallas_kernels.gelu_linear import api, gelu_linear, mosaic_sm90
from pallas_kernels.pbsa.timing import timed
from sfjax import rollout
from sfjax.config import read_config, split_overrides, to_dict
from sfjax.errors import Parser, check_flags, command
from sfjax.runlog import make_folder, run_record, write_json_atomic

BURST = 0.1  # seconds


@command
def main(argv: list[str]) -> None:
  """Times them and writes DIR/gelu_linear.json."""
  rest, overrides = split_overrides(argv)
  p = Parser(prog="python -m benchmarks.gelu_linear", description=__doc__.splitlines()[0])
  p.add_argument("--config", default="configs/wan_1_3b.py", metavar="FILE[:VARIANT]")
  p.add_argument("--layers", type=int, default=10, help="whose weights are taken in turn")
  p.add_argument("--turns", type=int, default=3)
  p.add_argument("--runs", type=int, default=20, help="bursts of a tenth of a second in a turn")
  p.add_argument("--out", default="out/gelu_linear")
  a = p.parse_args(rest)
  config = read_config(a.config, overrides)
  check_flags(a, ("layers", 1, 100), ("turns", 1, 100), ("runs", 1, 1000))
  out, model = make_folder(a.out, "--out"), config.model
  rows, k, f = model.layout.tokens, model.dim, model.ffn_dim
  keys = jax.random.split(jax.random.key(0, impl="rbg"), 1 + 2 * a.layers)
  normal = lambda key, *shape: jax.random.normal(key, shape, jnp.dtype(model.dtype))
  x = normal(keys[0], rows, k)
  layers = [(normal(i, k, f) * k**-0.5, normal(j, f)) for i, j in zip(keys[1::2], keys[2::2], strict=True)]

  calls = {"xla": api.by_xla, "product": lambda x, w, b: x @ w}
  if (reason := mosaic_sm90.unsupported(x, layers[0][0])) is None:
    calls["mosaic_sm90"] = functools.partial(gelu_linear, implementation="mosaic_sm90")
  else:
    print(f"without mosaic_sm90: {reason}")
  calls = {name: jax.jit(call, compiler_options=rollout._COMPILER) for name, call in calls.items()}  # as in a chunk
  jax.block_until_ready([call(x, *layers[0]) for call in calls.values()])  # compiled before power is read
  found = {name: {"ms": [], "watts": [], "mhz": []} for name in calls}
  weights = itertools.cycle(layers)
  for _, (name, call) in itertools.product(range(a.turns), calls.items()):
    one = functools.partial(lambda call: call(x, *next(weights)), call)
    with Watched() as watched:
      found[name]["ms"].append(timed(one, jax.block_until_ready, a.runs, BURST)["ms"])
    for what, value in watched.medians().items():
      found[name][what].append(value)

  print(f"{jax.devices()[0].device_kind}: [{rows},{k}] x [{k},{f}], {model.dtype}")
  wide = functools.partial(jax.tree.map, lambda a: a.astype(jnp.float32))
  with jax.default_matmul_precision("highest"):
    want = np.asarray(jax.jit(api.by_xla)(*wide((x, *layers[0]))), np.float64)
  for name, row in found.items():
    if name != "product":
      got = np.asarray(calls[name](x, *layers[0]), np.float64)
      row["error"] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    us = np.median(row["ms"]) * 1e3
    row["tflops"] = 2e-6 * rows * k * f / us
    told = f"{name:12s} {us:7.1f} us  {row['tflops']:6.1f} TFLOP/s"
    if row["watts"]:
      watts = np.median(row["watts"])
      row["mj"] = us * watts * 1e-3
      told += f"  {watts:4.0f} W  {row['mj']:6.1f} mJ"
    print(told, f"  error {row['error']:.2e}" if "error" in row else "")
  write_json_atomic(out / "gelu_linear.json", run_record(to_dict(config), flags=vars(a), **found, protocol=__doc__))


if __name__ == "__main__":
  main(sys.argv[1:])
