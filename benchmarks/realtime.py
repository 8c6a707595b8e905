"""Speed of sampling, chunk by chunk: the denoiser alone, with the VAE, and the VAE alone, on random weights at full size.

python -m benchmarks.realtime --config configs/wan_1_3b.py --seconds 20 --out out/realtime

What is timed is `Sampler.stream`, as sample.py runs it, after a short video has compiled everything; its chunks follow each
other on the device without a pause. "denoiser" is the time from the pixels of a chunk to the latents and the memory of the
next, "end to end" the time from pixels on the host to pixels on the host. The first frames are there when the first chunk's
pixels are on the host, after the request with the prompt's embedding in hand. Frames per second are those of the median chunk
in the steady state: from chunk W + C / blocks of a chunk on, when the memory is full; "late" is the median of the last four
chunks over that of the first four full ones.

Memories: "sparse", the config's own; "window", as many bytes without selection; "window9", the last 9 latents, "dense", the
last 21, and "full", all of the video.
"""

import argparse
import dataclasses
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
from sfjax.data.digits import chunk_of_frame
from sfjax.errors import Parser, UserError, command
from sfjax.memory import held_bytes
from sfjax.parts import Around, Parts, in_compute_dtype, wan_parts
from sfjax.routing import MemoryConfig
from sfjax.runlog import keep_programs, latency, make_folder, peak_memory, run_record, write_json_atomic
from sfjax.sampling import ATTENTION, Sampler, attention_preset
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
    Around(vae=vae),
    dit=random_weights(rollout.abstract_params(model), seed),
    pixels=random_weights(jax.eval_shape(lambda: WanVAE(vae).init()), seed + 1),
    check=lambda captions, flag: None,
    text=lambda captions: jnp.repeat(text, len(captions), 0),
  )


def memories(config: Config, seconds: float) -> dict[str, MemoryConfig]:
  """What can be asked for by --attention."""
  chunks = chunk_of_frame(round(seconds * config.data.fps) - 1) + 1
  presets = {name: attention_preset(config, name) for name in ATTENTION}
  return presets | {"window9": config.memory.of_window(3), "full": config.memory.of_window(chunks)}


def measure(parts: Parts, memory: MemoryConfig, seconds: float) -> dict:
  """Times of every chunk of a video, and what follows from them."""
  parts = dataclasses.replace(parts, config=dataclasses.replace(parts.config, memory=memory))
  sampler, model = Sampler(parts), parts.config.model
  frames = round(seconds * sampler.fps)
  began = time.perf_counter()
  for _ in sampler.stream(sampler.start(["x"], 0), min(frames, 21 + 12), 0, [0]):
    pass  # compiles the first and the later chunks' programs
  compiled = time.perf_counter() - began
  began, first = time.perf_counter(), None
  stream = sampler.stream(sampler.start(["x"], 1), frames, 1, [0])
  for pixels in stream:
    first = first or time.perf_counter() - began
    if not np.ptp(pixels):
      raise RuntimeError("the pixels are all the same: nothing was computed")
  times = np.array(stream.seconds)
  full = memory.window + math.ceil(memory.persistent / model.layout.blocks)
  full = full if full < len(times) else min(1, len(times) - 1)
  steady = np.median(times[full:], 0)
  per_chunk = model.chunk_frames * parts.codec.time
  return {
    "frames": frames,
    "compile_s": compiled,
    "first_frames_s": first,
    "fps_denoiser": per_chunk / float(steady[0]),
    "fps_end_to_end": per_chunk / float(steady[1]),
    "denoiser": latency(times[full:, 0].tolist()),
    "end_to_end": latency(times[full:, 1].tolist()),
    "late_over_early": float(np.median(times[-4:, 0]) / np.median(times[full : full + 4, 0])),
    "chunk_times_s": times.tolist(),
    "kv_bytes": {"predicted": sampler.kv_bytes["kv"], "measured": held_bytes(stream.memory)},
    "peak_memory": peak_memory(),
  }


def measure_decoder(parts: Parts, latents: int, runs: int = 5) -> dict:
  """Medians of decoding a chunk of a stream, and a whole clip of so many latents."""
  model, found = parts.config.model, {}
  draw = lambda n: jax.random.normal(jax.random.key(0), (1, n, *model.latent_size, model.latent_channels))
  state = parts.start(1)
  for name, x, first in (("clip", draw(latents), True), ("chunk", draw(model.chunk_frames), False)):
    times = []
    for _ in range(runs + 1):  # the first compiles
      began = time.perf_counter()
      state, pixels = parts.decode(state, x, first)
      pixels.block_until_ready()
      times.append(time.perf_counter() - began)
    found[name] = {"latents": x.shape[1], "frames": pixels.shape[1], "s": float(np.median(times[1:]))}
  return found


@command
def main(argv: list[str]) -> None:
  """Measures every attention and writes DIR/realtime.json."""
  rest, overrides = split_overrides(argv)
  p = Parser(prog="python -m benchmarks.realtime", description=__doc__.splitlines()[0])
  p.add_argument("--config", default="configs/wan_1_3b.py", metavar="FILE[:VARIANT]")
  choices = (*ATTENTION, "window9", "full")
  p.add_argument("--attention", nargs="+", choices=choices, default=["sparse", "window", "dense"])
  p.add_argument("--seconds", type=float, default=20.0, help="of video")
  p.add_argument(
    "--clip", type=int, default=21, metavar="LATENTS", help="length of the clip decoded as a whole; 0: none"
  )
  p.add_argument("--vae_dim", type=int, default=WanVAEConfig().dim, help=argparse.SUPPRESS)
  p.add_argument("--out", default="out/realtime")
  a = p.parse_args(rest)
  if not a.seconds > 0:
    raise UserError(f"--seconds: {a.seconds}; want more than 0")
  config = to_dataclass(Config, apply_overrides(load_config(a.config), overrides))
  out = make_folder(a.out, "--out")
  keep_programs()
  parts, rows, decoder = random_parts(config, WanVAEConfig(dim=a.vae_dim)), [], {}

  def save():
    record = run_record(to_dict(config), flags=vars(a), decoder=decoder, rows=rows, protocol=__doc__)
    write_json_atomic(out / "realtime.json", json.loads(json.dumps(record, default=str)))

  print(jax.devices()[0].device_kind)
  if a.clip:
    decoder |= measure_decoder(parts, a.clip)
    for name, x in decoder.items():
      print(f"decode a {name} of {x['latents']} latents, {x['frames']} frames: {x['s']:.3f} s", flush=True)
    save()
  print(
    "| memory | FPS denoiser | FPS end to end | first frames s | late / early | KV GB | peak GB |\n" + "|---" * 7 + "|"
  )
  for attention in a.attention:
    row = {"attention": attention} | measure(parts, memories(config, a.seconds)[attention], a.seconds)
    rows.append(row)
    cells = f"{row['fps_denoiser']:.1f} | {row['fps_end_to_end']:.1f} | {row['first_frames_s']:.3f}"
    peak = (row["peak_memory"]["device"] or 0) / 1e9
    held = row["kv_bytes"]["measured"] / 1e9
    print(f"| {attention} | {cells} | {row['late_over_early']:.3f} | {held:.2f} | {peak:.1f} |", flush=True)
    save()


if __name__ == "__main__":
  main(sys.argv[1:])
