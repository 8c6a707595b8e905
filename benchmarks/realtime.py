"""Speed of sampling, chunk by chunk: the denoiser alone and with the VAE, on random weights at full size.

python -m benchmarks.realtime --config configs/wan_1_3b.py --seconds 20 --out out/realtime

What is timed is `Sampler.stream`, as sample.py runs it, after a video of the same length has compiled everything. A chunk's
time ends when its latents and memory are there ("denoiser") and when its pixels are on the host ("end to end"); the first
frames end when the first chunk's pixels are, the prompt's embedding being in hand. Frames per second are those of the median
chunk in the steady state: from chunk W + C / blocks of a chunk on, when the memory is full.
"""

import argparse
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from sfjax import rollout
from sfjax.checkpoint import named
from sfjax.config import Config, apply_overrides, load_config, split_overrides, to_dataclass, to_dict
from sfjax.errors import Parser, UserError, command
from sfjax.parts import Parts, in_compute_dtype, wan_parts
from sfjax.runlog import latency, make_folder, peak_memory, run_record, write_json_atomic
from sfjax.sampling import Sampler
from sfjax.wan_vae import WanVAE, WanVAEConfig


def random_weights(like, seed: int):
  """Weights that keep a signal's size, shaped and typed as `like`: each shape is its own small program."""
  draw = jax.jit(
    lambda key, shape, dtype, size: (jax.random.normal(key, shape, jnp.float32) * size).astype(dtype),
    static_argnums=(1, 2),
  )
  leaves = named(like)
  keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
  made = []
  for key, (name, x) in zip(keys, leaves.items(), strict=True):
    if "kernel" in name:  # [.., in, out]; a convolution's sizes come before
      fan_in = math.prod(x.shape[:-1]) if len(x.shape) > 3 else x.shape[-2]
      made.append(draw(key, x.shape, x.dtype, fan_in**-0.5))
    elif "norm" in name or "gamma" in name:
      made.append(jnp.ones(x.shape, x.dtype))
    else:
      made.append(draw(key, x.shape, x.dtype, 0.02))
  return jax.tree.unflatten(jax.tree.structure(like), made)


def random_parts(config: Config, vae: WanVAEConfig, seed: int = 0) -> Parts:
  """What `load_parts` would read from a folder of such sizes; the text is 40 random rows."""
  config, vae = in_compute_dtype(config, vae)
  model = config.model
  row = jnp.arange(model.text_len)[:, None] < 40
  text = jax.random.normal(jax.random.key(seed + 2), (1, model.text_len, model.text_dim)) * row
  return wan_parts(
    config,
    vae,
    dit=random_weights(rollout.abstract_params(model), seed),
    pixels=random_weights(jax.eval_shape(lambda: WanVAE(vae).init()), seed + 1),
    check=lambda captions, flag: None,
    text=lambda captions: jnp.repeat(text, len(captions), 0),
  )


def measure(parts: Parts, attention: str, seconds: float) -> dict:
  """A row: times of every chunk of a video, and what follows from them."""
  sampler = Sampler(parts, attention)
  model, memory_config = sampler.config.model, sampler.config.memory
  frames = round(seconds * sampler.fps)
  began = time.perf_counter()
  for _ in sampler.stream(sampler.start(["x"], 0), min(frames, 21 + 12), 0, [0]):
    pass  # compiles the first and the later chunks' programs
  compiled = time.perf_counter() - began
  empty, times = sampler.start(["x"], 1), []
  jax.block_until_ready(empty)
  began, first = time.perf_counter(), None
  for pixels, memory, _ in sampler.stream(empty, frames, 1, [0], seconds=times):  # noqa: B007, the last one is weighed
    first = first or time.perf_counter() - began
    if not np.ptp(pixels):
      raise RuntimeError("the pixels are all the same: nothing was computed")
  full = memory_config.window + math.ceil(memory_config.persistent / model.layout.blocks)
  steady = np.array(times[full:] or times[1:] or times)
  per_chunk = model.chunk_frames * parts.codec.time
  held = sum(x.size * x.dtype.itemsize for x in (memory.k, memory.v, memory.pooled))
  return {
    "attention": attention,
    "frames": frames,
    "compile_s": compiled,
    "first_frames_s": first,
    "fps_denoiser": per_chunk / float(np.median(steady[:, 0])),
    "fps_end_to_end": per_chunk / float(np.median(steady[:, 1])),
    "denoiser": latency(steady[:, 0].tolist()),
    "end_to_end": latency(steady[:, 1].tolist()),
    "last_over_first_full": float(times[-1][0] / times[min(full, len(times) - 1)][0]),
    "chunk_times_s": times,
    "kv_bytes": {"predicted": sampler.kv_bytes["kv"], "measured": held},
    "peak_memory": peak_memory(),
  }


@command
def main(argv: list[str]) -> None:
  """Measures every attention and writes DIR/realtime.json."""
  rest, overrides = split_overrides(argv)
  p = Parser(prog="python -m benchmarks.realtime", description=__doc__.splitlines()[0])
  p.add_argument("--config", default="configs/wan_1_3b.py", metavar="FILE[:VARIANT]")
  p.add_argument("--attention", nargs="+", choices=("sparse", "window", "dense"), default=["sparse", "window", "dense"])
  p.add_argument("--seconds", type=float, default=20.0, help="of video")
  p.add_argument("--vae_dim", type=int, default=WanVAEConfig().dim, help=argparse.SUPPRESS)
  p.add_argument("--out", default="out/realtime")
  a = p.parse_args(rest)
  if not a.seconds > 0:
    raise UserError(f"--seconds: {a.seconds}; want more than 0")
  config = to_dataclass(Config, apply_overrides(load_config(a.config), overrides))
  out = make_folder(a.out, "--out")
  parts, rows = random_parts(config, WanVAEConfig(dim=a.vae_dim)), []
  head = "| attention | FPS denoiser | FPS end to end | first frames s | KV GB |\n" + "|---" * 5 + "|"
  print(f"{jax.devices()[0].device_kind}\n{head}", flush=True)
  for attention in a.attention:
    row = measure(parts, attention, a.seconds)
    rows.append(row)
    cells = f"{row['fps_denoiser']:.1f} | {row['fps_end_to_end']:.1f} | {row['first_frames_s']:.2f}"
    print(f"| {attention} | {cells} | {row['kv_bytes']['measured'] / 1e9:.2f} |", flush=True)
    record = run_record(to_dict(config), flags=vars(a), rows=rows, protocol=__doc__)
    write_json_atomic(out / "realtime.json", json.loads(json.dumps(record, default=str)))


if __name__ == "__main__":
  main(sys.argv[1:])
