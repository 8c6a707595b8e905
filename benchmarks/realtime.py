"""Speed of sampling, chunk by chunk: the denoiser alone, with the VAE, and the VAE alone, on random weights at full size.

python -m benchmarks.realtime --config configs/wan_1_3b.py --seconds 5 20 60 --out out/realtime

What is timed is `Sampler.stream`, as sample.py runs it, after a short video has compiled everything; its chunks follow each
other on the device without a pause. "denoiser" is the time from the pixels of a chunk to the latents and the memory of the
next, "end to end" the time from pixels on the host to pixels on the host. The first frames are there when the first chunk's
pixels are on the host, after the request with the prompt's embedding in hand. Frames per second are those of the median chunk
in the steady state: from chunk W + C / blocks of a chunk on, when the memory is full; "late" is the median of the last four
chunks over that of the first four full ones. One video a memory, of the longest --seconds; the shorter ones are its beginning.

--devices N shares the tokens of every chunk among N devices; bytes and peaks are then the first one's, which also decodes.
With --decode_apart one more does, while they denoise the next chunk: "denoiser" is then the time from latents to latents, and
where decoding takes longer, that of decoding; `benchmarks.chunk` times the chunk's program alone.

--routing and --commit time the sampler's options, every memory with each of them: lists found in every step or once a chunk;
K/V kept from a clean pass, or from the last step, which is a pass less ("passes" of a run: those of a chunk). --slots, too:
K/V of earlier chunks in the model's dtype, or in float8; and --linear: a layer's products in the model's dtype, or in float8.

--streams N makes N videos together, each with its own memory and noise: frames and bytes are those of all, times those of a
chunk of each.

Memories: "sparse", the config's own; "window", as many bytes without selection; "window9", the last 9 latents, "dense", the
last 21, and "full", all of the video, or as much as the device holds beside the workspace of the memories before: what is
longer is not run, and its row tells the bytes it would take. Dense ones are read by pbsa, all blocks, the library's only way.

Bytes are those of `sfjax.ledger`: predicted from shapes, then measured on the run's arrays; "live" is all that the device
held at the end. The peak is predicted as what is held and the largest workspace of the compiled programs; measured it is
the highest since the program began, so that memories are best asked for from the smallest on.

--self_forcing DIR times Self-Forcing in PyTorch from a clone, see `benchmarks.self_forcing_peer`; its frames per second with
the VAE are those of the whole clip, decoded at its end.
"""

import argparse
import bisect
import dataclasses
import gc
import itertools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks import self_forcing_peer
from benchmarks.realtime_report import HEADER, line, peer_line, plot
from sfjax import cluster, ledger, rollout
from sfjax.checkpoint import named
from sfjax.config import Config, read_config, split_overrides, to_dict
from sfjax.data.digits import first_frame
from sfjax.errors import Parser, UserError, command
from sfjax.flow import COMMITS, ROUTING
from sfjax.memory import held_bytes, memory_bytes
from sfjax.model import LINEAR, ModelConfig
from sfjax.parts import Around, Parts, as_stored, in_compute_dtype, wan_parts, with_decoder_apart, with_linear
from sfjax.routing import SLOTS, MemoryConfig
from sfjax.runlog import keep_programs, latency, make_folder, peak_memory, run_record, write_json_atomic
from sfjax.sampling import ATTENTION, Sampler
from sfjax.wan_vae import WanVAE, WanVAEConfig


def random_weights(like, seed: int):
  """Weights that keep a signal's size, shaped, typed and placed as `like`: each shape is its own small program."""
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
    if x.sharding is not None:
      made[-1] = jax.device_put(made[-1], x.sharding, donate=True)
  return jax.tree.unflatten(jax.tree.structure(like), made)


def random_text(model: ModelConfig, rows: int, seed: int) -> Float[Array, "1 M E"]:
  """A prompt's embedding: so many random rows, and zeros behind them."""
  text = jax.random.normal(jax.random.key(seed), (1, model.text_len, model.text_dim))
  return text * (jnp.arange(model.text_len)[:, None] < rows)


def random_parts(config: Config, vae: WanVAEConfig, seed: int = 0, devices: int = 1) -> Parts:
  """What `load_parts` would read from a folder of such sizes; the text is 40 random rows."""
  linear = config.model.linear
  config, vae = in_compute_dtype(as_stored(config), vae)
  model, mesh = config.model, cluster.tokens_mesh(devices, config.model)
  text = random_text(model, 40, seed + 2)
  parts = wan_parts(
    config,
    Around(vae=vae),
    dit=random_weights(cluster.laid_out(mesh, rollout.abstract_params(model)), seed),
    pixels=random_weights(jax.eval_shape(lambda: WanVAE(vae).init()), seed + 1),
    check=lambda captions, flag: None,
    text=lambda captions: jnp.repeat(text, len(captions), 0),
    mesh=mesh,
  )
  return with_linear(parts, linear)


def memory_of(config: Config, attention: str, chunks: int) -> MemoryConfig:
  """What can be asked for by --attention, for a video of so many chunks."""
  return config.memory.of_window(3) if attention == "window9" else ledger.memory_for(config, attention, chunks)


def fitting(parts: Parts, attention: str, chunks: int, spare: int, streams: int = 1) -> int:
  """Chunks of the longest video, up to `chunks`, whose predicted bytes and `spare` more fit in the device's memory."""
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf) - spare
  fits = lambda n: predict(parts, memory_of(parts.config, attention, n), streams)["total"] <= limit
  return chunks if fits(chunks) else bisect.bisect_left(range(1, chunks), True, key=lambda n: not fits(n))


def predict(parts: Parts, memory: MemoryConfig, streams: int = 1) -> dict[str, int]:
  """The ledger's rows for that memory."""
  devices = parts.mesh.size if parts.mesh else 1
  config, apart = dataclasses.replace(parts.config, memory=memory), parts.decoder is not None
  return ledger.predict(config, parts.around, streams, devices, apart)


def held_by(device: jax.Device) -> int:
  """Bytes of all arrays there; a buffer that several share, as an array and its shard do, counts once."""
  shards = (s.data for x in jax.live_arrays() for s in x.addressable_shards if s.device == device)
  return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())


def measure(parts: Parts, memory: MemoryConfig, chunks: int, streams: int = 1) -> dict:
  """Times of every chunk of `streams` videos made together, and the bytes held."""
  parts = dataclasses.replace(parts, config=dataclasses.replace(parts.config, memory=memory))
  sampler, frames = Sampler(parts), first_frame(chunks)
  prompts, samples = ["x"] * streams, list(range(streams))
  began = time.perf_counter()
  for _ in sampler.stream(sampler.start(prompts, 0), min(frames, 21 + 12), 0, samples):
    pass  # compiles the first and the later chunks' programs
  compiled = time.perf_counter() - began
  began, first = time.perf_counter(), None
  stream = sampler.stream(sampler.start(prompts, 1), frames, 1, samples)
  for pixels in stream:
    first = first or time.perf_counter() - began
    if not np.ptp(pixels):
      raise RuntimeError("the pixels are all the same: nothing was computed")
  told = ledger.told(parts, parts.config, stream, streams)
  return {
    "frames": frames,
    "compile_s": compiled,
    "first_frames_s": first,
    "chunk_times_s": stream.seconds,
    "kv_bytes": {"predicted": streams * sampler.kv_bytes["kv"], "measured": held_bytes(stream.memory)},
    "device_bytes": told | {"live": held_by(jax.local_devices()[0])},
    "peak_memory": {"predicted": told["predicted"]["total"] + max(told["workspace"].values())} | peak_memory(),
  }


def summary(parts: Parts, memory: MemoryConfig, times: np.ndarray, streams: int = 1) -> dict:
  """What follows from the times of the videos' first chunks; frames are those of all of them."""
  model = parts.config.model
  full = memory.window + math.ceil(memory.persistent / max(1, model.layout.whole_blocks))
  full = full if full < len(times) else min(1, len(times) - 1)
  per_chunk, steady = streams * model.chunk_frames * parts.codec.time, np.median(times[full:], 0)
  return {
    "fps_denoiser": per_chunk / float(steady[0]),
    "fps_end_to_end": per_chunk / float(steady[1]),
    "denoiser": latency(times[full:, 0].tolist()),
    "end_to_end": latency(times[full:, 1].tolist()),
    "late_over_early": float(np.median(times[-4:, 0]) / np.median(times[full : full + 4, 0])),
  }


def rows_of(
  parts: Parts, attention: str, seconds: list[float], spare: int, streams: int = 1
) -> tuple[dict, list[dict]]:
  """A memory's run of the longest video that fits, and a row for each of `seconds` and for that length if it is another."""
  config = parts.config
  made = {"attention": attention, "routing": config.sampler.routing, "commit": config.sampler.commit}
  made |= {"slots": config.memory.slots, "linear": config.model.linear}
  wanted = {ledger.chunks_of(config, s): s for s in sorted(seconds)}
  longest = fitting(parts, attention, max(wanted), spare, streams)
  run, rows = {}, []
  while longest and not run:
    try:
      measured = measure(parts, memory_of(config, attention, longest), longest, streams)
      run = made | {"passes": config.sampler.passes} | measured
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      shorter = longest * 4 // 5  # it seemed to fit
      longest = shorter if memory_of(config, attention, shorter) != memory_of(config, attention, longest) else 0
    gc.collect()  # what did not fit is held by the error, in a circle
  if run:
    wanted.setdefault(longest, first_frame(longest) / config.data.fps)
  for chunks, s in sorted(wanted.items()):
    memory = memory_of(config, attention, chunks)
    row = made | {"seconds": s, "chunks": chunks, "measured": chunks <= longest}
    row |= {"kv_bytes": streams * memory_bytes(config.model, memory)["kv"]}
    row |= {"total_bytes": predict(parts, memory, streams)["total"]}
    if row["measured"]:
      row |= summary(parts, memory, np.array(run["chunk_times_s"][:chunks]), streams)
    rows.append(row)
  return run, rows


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
  """Measures every attention and writes DIR/realtime.json and DIR/realtime.png."""
  rest, overrides = split_overrides(argv)
  p = Parser(prog="python -m benchmarks.realtime", description=__doc__.splitlines()[0])
  p.add_argument("--config", default="configs/wan_1_3b.py", metavar="FILE[:VARIANT]")
  choices = (*ATTENTION, "window9", "full")
  p.add_argument("--attention", nargs="+", choices=choices, default=["sparse", "window9", "dense", "full"])
  p.add_argument("--routing", nargs="+", choices=ROUTING, help="default: the config's")
  p.add_argument("--commit", nargs="+", choices=COMMITS, help="default: the config's")
  p.add_argument("--slots", nargs="+", choices=SLOTS, help="default: the config's")
  p.add_argument("--linear", nargs="+", choices=LINEAR, help="default: the config's")
  p.add_argument("--seconds", type=float, nargs="+", default=[5.0, 20.0, 60.0, 300.0], help="of video")
  p.add_argument(
    "--clip", type=int, default=21, metavar="LATENTS", help="length of the clip decoded as a whole; 0: none"
  )
  p.add_argument("--streams", type=int, default=1, help="videos made together, each with its memory")
  p.add_argument("--devices", type=int, default=1, help="that share the tokens of every chunk")
  p.add_argument("--decode_apart", action="store_true", help="decode on one device more, beside the next chunk")
  p.add_argument("--self_forcing", metavar="DIR", help="a clone of guandeh17/Self-Forcing, to time it in PyTorch")
  p.add_argument("--vae_dim", type=int, default=WanVAEConfig().dim, help=argparse.SUPPRESS)
  p.add_argument("--out", default="out/realtime")
  a = p.parse_args(rest)
  for seconds in a.seconds:
    if not 0 < seconds <= 3600:
      raise UserError(f"--seconds: {seconds:g}; want more than 0 and at most 3600")
  if a.streams < 1:
    raise UserError(f"--streams: {a.streams}; want 1 or more")
  config = read_config(a.config, overrides)
  out = make_folder(a.out, "--out")
  # Before JAX has taken the device's memory.
  peer = self_forcing_peer.run_beside(a.self_forcing) if a.self_forcing else {}
  if a.decode_apart:
    cluster.device_beside(a.devices)
  keep_programs()
  runs, rows, decoder = [], [], {}

  def made(linear):
    model = dataclasses.replace(config.model, linear=linear)
    parts = random_parts(dataclasses.replace(config, model=model), WanVAEConfig(dim=a.vae_dim), devices=a.devices)
    return with_decoder_apart(parts) if a.decode_apart else parts

  linears = a.linear or [config.model.linear]
  parts = made(linears[0])

  def save():
    measured = {"decoder": decoder, "runs": runs, "rows": rows, "self_forcing": peer}
    record = run_record(to_dict(config), flags=vars(a), **measured, protocol=__doc__)
    write_json_atomic(out / "realtime.json", json.loads(json.dumps(record, default=str)))
    plot(runs, peer.get("rows", []), config.data.fps, out / "realtime.png")

  print(jax.devices()[0].device_kind)
  if peer.get("skipped"):
    print(f"Self-Forcing skipped: {peer['skipped']}")
  if a.clip:
    decoder |= measure_decoder(parts, a.clip)
    for name, x in decoder.items():
      print(f"decode a {name} of {x['latents']} latents, {x['frames']} frames: {x['s']:.3f} s", flush=True)
  print(HEADER)
  for row in peer.get("rows", []):
    print(peer_line(row, config.data.fps), flush=True)
  save()
  own = config.sampler
  for linear, attention, routing, commit, slots in itertools.product(
    linears, a.attention, a.routing or [own.routing], a.commit or [own.commit], a.slots or [config.memory.slots]
  ):
    if linear != parts.config.model.linear:
      parts = asked = None  # before the next weights come
      parts = made(linear)
    spare = max((n for r in runs for n in r["device_bytes"]["workspace"].values()), default=0)
    sampler = dataclasses.replace(own, routing=routing, commit=commit)
    memory = dataclasses.replace(config.memory, slots=slots)
    asked = dataclasses.replace(parts, config=dataclasses.replace(parts.config, sampler=sampler, memory=memory))
    run, found = rows_of(asked, attention, a.seconds, spare, a.streams)
    runs.extend([run] if run else [])
    rows.extend(found)
    for row in found:
      print(line(row, run), flush=True)
    save()


if __name__ == "__main__":
  main(sys.argv[1:])
