"""What sampling holds on the device, in bytes, from shapes alone: python -m sfjax.ledger --config FILE | --checkpoint DIR.

With --devices N, on the first of those that sample one video together, and with --decode_apart on the one that decodes. With
--training, what a step of distillation takes on each of --devices N: see `training_ledger`.

`predict` and `measure` give the same rows: the one makes no array, so that a laptop answers for the 14B model in seconds, the
other adds up the arrays of a run. run.json and `benchmarks.realtime` set them side by side. Not counted, as no shape tells it:
what XLA's compiled programs need meanwhile (`Stream.workspace` says it after a run), and what a library keeps for itself.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from sfjax import checkpoint, cluster, rollout
from sfjax.config import Config, apply_overrides, load_config, split_overrides, to_config_dict, to_dataclass
from sfjax.data.digits import chunk_of_frame
from sfjax.errors import Parser, UserError, command
from sfjax.memory import KVMemory, init_memory, slots_of, split
from sfjax.model import ModelConfig
from sfjax.parts import Around, Parts, around
from sfjax.routing import MemoryConfig
from sfjax.sampling import ATTENTION, Stream, attention_preset
from sfjax.text import WordEncoder
from sfjax.tiny_vae import TinyVAE
from sfjax.umt5 import abstract_umt5
from sfjax.wan_vae import WanVAE

_CODEC = "vae", "tiny_decoder", "codec_state"
ROWS = {
  "dit": "DiT",
  "vae": "VAE, encoder and decoder",
  "tiny_decoder": "tiny decoder",
  "text": "text encoder",
  "persistent": "K/V slots of P",
  "window": "K/V slots of the window",
  "pooled": "pooled keys",
  "bookkeeping": "scores, origins, counters",
  "cross": "cross-attention K/V",
  "codec_state": "the decoder's state",
  "in_flight": "latents and pixels of two chunks",
}


def tree_bytes(tree) -> int:
  """Of all arrays of a pytree, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def total(rows: dict[str, int]) -> dict[str, int]:
  """The rows and, as "total", their sum."""
  return rows | {"total": sum(rows.values())}


def memory_rows(cfg: MemoryConfig, m: KVMemory) -> dict[str, int]:
  """A memory, or its shapes, by part."""
  slots, blocks = tree_bytes(slots_of(m)), m.pooled.shape[2]
  persistent = slots // blocks * cfg.persistent
  return {
    "persistent": persistent,
    "window": slots - persistent,
    "pooled": tree_bytes(m.pooled),
    "bookkeeping": tree_bytes((m.score, m.origin, m.chunk, m.rng, m.cross_distinct)),
    "cross": tree_bytes((m.cross_k, m.cross_v)),
  }


def abstract_memory(config: Config, batch: int, devices: int = 1, axis: str = "tokens") -> KVMemory:
  """Shapes of the memory of so many videos, or of each device's part along a mesh's axis; guidance doubles their rows."""
  model, rows = config.model, batch * (1 if config.sampler.guidance == 1 else 2)
  shape = (model.layers, rows, model.text_len, model.heads, model.head_dim)
  cross = jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype))
  distinct = jax.ShapeDtypeStruct(shape[:2], jnp.int32)
  memory = jax.eval_shape(lambda *text_kv: init_memory(model, config.memory, text_kv), cross, cross, distinct)
  mesh = AbstractMesh((devices,), (axis,))
  own = lambda x, spec: jax.ShapeDtypeStruct(NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype)
  return jax.tree.map(lambda spec, x: jax.tree.map(lambda x: own(x, spec), x), split(axis), memory)


@functools.cache
def abstract_weights(model: ModelConfig, sizes: Around) -> dict[str, Any]:
  """Shapes of the weights by part, all that there are."""
  found = {"dit": rollout.abstract_params(model)}
  if sizes.vae:
    found["vae"] = jax.eval_shape(lambda: WanVAE(sizes.vae).init())
  if sizes.tiny_decoder:
    found["tiny_decoder"] = jax.eval_shape(lambda: TinyVAE(sizes.tiny_decoder).init())
  if isinstance(sizes.text, WordEncoder):
    found["text"] = jax.eval_shape(lambda: sizes.text.init(0))
  elif sizes.text:
    found["text"] = abstract_umt5(sizes.text)
  return found


def in_flight(config: Config, codec, batch: int) -> tuple[int, int]:
  """While the caller has one chunk, the device makes the next: of each the latents, given or made, and the pixels."""
  frames, (h, w) = config.model.chunk_frames, config.model.latent_size
  latents = frames * h * w * config.model.latent_channels * 4
  pixels = frames * codec.time * h * w * codec.space**2 * 3
  return 2 * batch * latents, 2 * batch * pixels


def predict(
  config: Config, sizes: Around, batch: int = 1, devices: int = 1, decode_apart: bool = False
) -> dict[str, int]:
  """What is held while videos are made, by the names of `ROWS`, and "total": of several devices, by the first one.

  Args:
    config, sizes: as `around` or a loaded folder's `Parts` have them. batch: videos made together.
    devices: that share the tokens of every chunk, and the heads of its memory, which they divide.
    decode_apart: whether another than these has the codec.
  """
  stays = lambda name: name != "text" or isinstance(sizes.text, WordEncoder)  # else it is gone before sampling begins
  weights = {name: x for name, x in abstract_weights(config.model, sizes).items() if stays(name)}
  state, (latents, pixels) = (), in_flight(config, sizes.codec, batch)
  if sizes.vae:
    state = jax.eval_shape(lambda: sizes.codec.init_decoder_state(batch, *config.model.latent_size))
  rows = {name: tree_bytes(x) for name, x in weights.items()}
  rows |= memory_rows(config.memory, abstract_memory(config, batch, devices))
  rows |= {"codec_state": tree_bytes(state), "in_flight": 2 * latents + (0 if decode_apart else pixels)}
  return total(_of_codec(rows, False) if decode_apart else rows)


def predict_decoder(config: Config, sizes: Around, batch: int = 1) -> dict[str, int]:
  """What a device of its own for the codec holds."""
  return total(
    _of_codec(predict(config, sizes, batch), True) | {"in_flight": sum(in_flight(config, sizes.codec, batch))}
  )


def _of_codec(rows: dict[str, int], of: bool) -> dict[str, int]:
  """The codec's rows, or all others."""
  return {name: n for name, n in rows.items() if name != "total" and (name in _CODEC) == of}


def predict_embedding(config: Config, sizes: Around) -> dict[str, int]:
  """What is held, without activations, while new prompts are embedded, before sampling begins; and "total"."""
  return total({name: tree_bytes(x) for name, x in abstract_weights(config.model, sizes).items()})


def measure(parts: Parts, cfg: MemoryConfig, memory: KVMemory, decoded) -> dict[str, int]:
  """The arrays of a run by the same names, and "total", of the first device; chunks in flight are not among them.

  Args:
    memory, decoded: what a `Stream` holds after its last frame.
  """
  first = lambda tree: jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)
  others = {} if parts.decoder and parts.around.vae else parts.others
  weights, memory = first({"dit": parts.dit} | others), first(memory)
  rows = {name: tree_bytes(x) for name, x in weights.items()} | memory_rows(cfg, memory)
  return total(rows if parts.decoder else rows | {"codec_state": tree_bytes(decoded)})


def measure_decoder(parts: Parts, decoded) -> dict[str, int]:
  """The same of a device of its own for the codec."""
  rows = {name: tree_bytes(x) for name, x in parts.others.items()} | {"codec_state": tree_bytes(decoded)}
  return total(_of_codec(rows, True))


def told(parts: Parts, config: Config, stream: Stream, batch: int = 1) -> dict[str, dict]:
  """Predicted and measured rows of the first device after a stream's last frame, and its programs' workspace; where another
  decodes, its own as "decoder"."""
  apart, devices = parts.decoder is not None, parts.mesh.size if parts.mesh else 1
  workspace = stream.workspace()
  of = lambda decodes: {name: n for name, n in workspace.items() if not apart or name.startswith("decode") == decodes}
  found = {
    "predicted": predict(config, parts.around, batch, devices, apart),
    "measured": measure(parts, config.memory, stream.memory, stream.decoded),
    "workspace": of(False),
  }
  if apart:
    rows = predict_decoder(config, parts.around, batch), measure_decoder(parts, stream.decoded)
    found["decoder"] = {"predicted": rows[0], "measured": rows[1], "workspace": of(True)}
  return found


def chunks_of(config: Config, seconds: float) -> int:
  """Chunks of a video."""
  return chunk_of_frame(max(1, round(seconds * config.data.fps)) - 1) + 1


def memory_for(config: Config, attention: str, chunks: int) -> MemoryConfig:
  """A preset of `attention_preset`, or "full": a dense memory of a whole video of so many chunks."""
  return config.memory.of_window(chunks) if attention == "full" else attention_preset(config, attention)


def table(rows: dict[str, int]) -> str:
  """Rows as a markdown table, those without a byte left out."""
  cells = [(ROWS.get(name, f"**{name}**"), n) for name, n in rows.items() if n]
  return "\n".join(["| | GB | bytes |", "|---|---|---|", *(f"| {what} | {n / 1e9:.3f} | {n:,} |" for what, n in cells)])


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
  """Flags, checked as far as they can be without a config, and the config's overrides."""
  rest, overrides = split_overrides(argv)
  p = Parser(
    prog="python -m sfjax.ledger",
    description="Predicts what sampling or a step of distillation takes on a device, in the dtypes of the config; "
    "--config.KEY=VALUE changes it.",
  )
  of = p.add_mutually_exclusive_group(required=True)
  of.add_argument("--config", metavar="FILE[:VARIANT]")
  of.add_argument("--checkpoint", metavar="DIR", help="a model folder or a training run")
  sampling = p.add_argument_group("sampling")
  sampling.add_argument(
    "--attention", choices=(*ATTENTION, "full"), help="default sparse; full: dense, of the whole video"
  )
  sampling.add_argument("--seconds", type=float, help="of video, for --attention full")
  sampling.add_argument("--batch", type=int, help="videos made together, default 1")
  sampling.add_argument("--decode_apart", action="store_true", default=None, help="another device has the codec")
  p.add_argument(
    "--devices",
    type=int,
    help="that sample one video; or of a run, over --config.train.fsdp of which its state is split",
  )
  training = p.add_argument_group("training")
  training.add_argument("--training", action="store_true", help="a step of distillation in place of sampling")
  training.add_argument(
    "--teacher", metavar="FILE[:VARIANT]", help="default: config.distill.teacher, or the student's sizes"
  )
  training.add_argument(
    "--critic", metavar="FILE[:VARIANT]", help="default: config.distill.critic, or the teacher's sizes"
  )
  a = p.parse_args(rest)
  strange = ("attention", "seconds", "batch", "decode_apart") if a.training else ("teacher", "critic")
  for name in strange:
    if getattr(a, name) is not None:
      raise UserError(f"--{name}: {getattr(a, name)}; wanted {'without' if a.training else 'with'} --training alone")
  defaults = {"attention": "sparse", "batch": 1, "devices": 1}
  for name, value in defaults.items():
    if getattr(a, name) is None:
      setattr(a, name, value)
  if (a.seconds is None) == (a.attention == "full"):
    raise UserError("--seconds: wanted with --attention full, and only there")
  if a.seconds is not None and not 0 < a.seconds <= 24 * 3600:
    raise UserError(f"--seconds: {a.seconds:g}; want more than 0 and at most {24 * 3600}")
  for name in ("batch", "devices"):
    if getattr(a, name) < 1:
      raise UserError(f"--{name}: {getattr(a, name)}; want 1 or more")
  return a, overrides


@command
def main(argv: list[str]) -> None:
  """Prints the predicted bytes."""
  a, overrides = parse(argv)
  folder = pathlib.Path(a.checkpoint) if a.checkpoint else None
  if folder:
    loaded = to_config_dict(to_dataclass(Config, checkpoint.load_config(folder), "--checkpoint: config"))
  else:
    loaded = load_config(a.config)
  config = to_dataclass(Config, apply_overrides(loaded, overrides))
  if a.training:
    config.check_trains()
    from sfjax import training_ledger  # only here: it loads what training needs

    teacher, critic = training_ledger.judges(config, a.teacher, a.critic)
    told = training_ledger.predict(config, teacher, critic, a.devices)
    train = config.train
    over = cluster.told(a.devices, train.tensor) if train.tensor > 1 else f"{a.devices} device(s)"
    each = f"{training_ledger.clips(config, a.devices)} clip(s) on each of {over}"
    print(f"{a.checkpoint or a.config}: {each}, the state split over {train.fsdp * train.tensor}\n")
    print(f"{training_ledger.table(told)}\n\n{training_ledger.verdict(told, config, teacher, critic, a.devices)}")
    if config.model.remat != "full":
      print(f"estimated for remat full; config.model.remat is {config.model.remat}, which keeps more")
    return
  config, sizes = around(config, folder)
  chunks = chunks_of(config, a.seconds or 0)
  config = dataclasses.replace(config, memory=memory_for(config, a.attention, chunks))
  memory = f"a window of {config.memory.window} chunks, {config.memory.persistent} persistent blocks"
  cluster.check_tokens(a.devices, config.model)
  first = f", on the first of {a.devices} devices" if a.devices > 1 else ""
  print(f"{a.checkpoint or a.config}: {memory}, {config.model.dtype}\n\nwhile {a.batch} video(s) are made{first}:\n")
  print(table(predict(config, sizes, a.batch, a.devices, bool(a.decode_apart))))
  if a.decode_apart:
    print(f"\non the one that decodes:\n\n{table(predict_decoder(config, sizes, a.batch))}")
  if sizes.text and not isinstance(sizes.text, WordEncoder):
    print("\nbefore, while new prompts are embedded:\n")
    print(table(predict_embedding(config, sizes)))
  print(
    "\nnot counted: the workspace of XLA's programs, which a run tells (run.json), and activations of the text encoder"
  )


if __name__ == "__main__":
  main(sys.argv[1:])
