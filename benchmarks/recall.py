"""Does the memory remember? The claim of Sparse Forcing at toy size, with the real model, objective and rollout, on a CPU.

A clip of latents shows one of ten patterns in one of four tiles, covers it for some chunks, and uncovers it. Every arm is
trained from the same dense base, for half its steps. Measured: the pattern that the model itself puts back, by how long it
was covered. A window relays what it saw for about L (W - 1) chunks; what lasts longer must be in P.

python -m benchmarks.recall --out DIR

Letters: B clips, n chunks, F latent frames of a chunk, h, w, C a latent frame.
"""

import argparse
import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sfjax import rollout
from sfjax.config import Config, DataConfig, Stage, TrainConfig, to_dict
from sfjax.errors import Parser, command
from sfjax.evaluation.intervals import wilson
from sfjax.flow import SamplerConfig
from sfjax.model import ModelConfig
from sfjax.objective import loss
from sfjax.optimizer import optimizer
from sfjax.routing import MemoryConfig
from sfjax.runlog import make_folder, run_record, write_json_atomic
from sfjax.text import WordEncoder

MODEL = ModelConfig(
  dim=64, layers=2, heads=2, ffn_dim=128, text_dim=8, text_len=1, latent_channels=4, latent_size=(8, 8), tile=(3, 2, 2),
  freq_dim=64, prediction="x0", importance_head=True, dtype="float32",
)  # fmt: skip
SHOWN = 2  # chunks in view before the cover
HIDDEN = (1, 3)  # chunks of cover in training
CHUNKS = SHOWN + HIDDEN[1] + 2
SPARSE = MemoryConfig(
  window=2, persistent=4, top_k=0.5, importance="learned", rope_cap=(CHUNKS - 1) * MODEL.chunk_frames
)  # fmt: skip
ARMS = {
  "learned importance": SPARSE,
  "random P": dataclasses.replace(SPARSE, importance="random"),
  "window, same bytes": MemoryConfig(window=3),
  "attention importance": dataclasses.replace(SPARSE, importance="attention"),
  "dense": MemoryConfig(window=CHUNKS),
}
PATTERNS = np.sign(np.random.default_rng(0).normal(size=(10, 4, 4, 3))).astype(np.float32)


def clips(key: Array, size: int, chunks: int, hide: tuple[int, int]) -> tuple[Float[Array, "B n F h w C"], dict]:
  """Clips and their truth: identity and place. The last channel counts down to the uncovering.

  It counts no higher than in training, so that a longer cover looks like nothing new.
  """
  keys = jax.random.split(key, 4)
  identity = jax.random.randint(keys[0], (size,), 0, len(PATTERNS))
  place = jax.random.randint(keys[1], (size,), 0, 4)
  hidden = jax.random.randint(keys[2], (size,), hide[0], hide[1] + 1)
  t = jnp.arange(chunks)
  left = jnp.maximum(SHOWN + hidden[:, None] - t, 0) * (t >= SHOWN)
  object_ = jnp.where((left > 0)[..., None, None, None], 0.5, jnp.asarray(PATTERNS)[identity][:, None])
  here = jax.nn.one_hot(place, 4).reshape(size, 2, 2)
  colours = jnp.einsum("bij,bnhwc->bnihjwc", here, object_).reshape(size, chunks, 8, 8, 3)
  count = jnp.minimum(left, HIDDEN[1])[:, :, None, None, None] / HIDDEN[1]
  count = jnp.broadcast_to(count, (*colours.shape[:-1], 1))
  x = jnp.concatenate([colours, count], -1)[:, :, None]
  x = jnp.repeat(x, MODEL.chunk_frames, 2)
  noise = jax.random.normal(keys[3], x.shape) * 0.05
  return x + noise, {"identity": identity, "place": place}


def config_of(memory: MemoryConfig, steps: int, dense: bool) -> Config:
  """The experiment as a config of the real trainer."""
  stage = Stage(until=1.0, chunks=CHUNKS, batch=16, dense=dense)
  train = TrainConfig(steps, (stage,), lr=2e-3, decay=0.5, shift=3.0, p_known=0.0)
  return Config("recall", MODEL, memory, SamplerConfig(steps=8, shift=3.0), DataConfig(), train)


def trained(config: Config, params: dict, seed: int) -> dict:
  """Parameters after the config's steps, the batches drawn from `seed`."""
  stage, tx = config.train.stages[0], optimizer(config.train)
  words = jnp.zeros((stage.batch, MODEL.text_len), jnp.int32)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt, key):
    x, _ = clips(jax.random.fold_in(key, 0), stage.batch, CHUNKS, HIDDEN)
    x = x.reshape(stage.batch, -1, *x.shape[3:])
    f = lambda p: loss(config, stage, p, x, words, jax.random.fold_in(key, 1), jnp.arange(stage.batch))
    (_, metrics), grads = jax.value_and_grad(f, has_aux=True)(params)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, metrics

  params, key = jax.tree.map(jnp.copy, params), jax.random.key(seed)
  opt = tx.init(params)
  for i in range(config.train.steps):
    params, opt, metrics = step(params, opt, jax.random.fold_in(key, i))
  print(f"  {config.train.steps} steps: flow {metrics['flow']:.4f}, importance {metrics['importance']:.4f}", flush=True)
  return params


@functools.partial(jax.jit, static_argnums=(0, 3))
def recalled(config: Config, params: dict, key: Array, hide: int) -> Int[Array, " 256"]:
  """Whether the model puts the pattern back that a real prefix showed and covered for `hide` chunks."""
  size, n = 256, SHOWN + hide
  x, truth = clips(key, size, n + 1, (hide, hide))
  text = WordEncoder(MODEL.text_len, MODEL.text_dim).encode(params["text"], jnp.zeros((size, 1), jnp.int32))
  memory = rollout.start(MODEL, config.memory, params["dit"], text)

  def append(m, chunk):
    return rollout.append_chunk(MODEL, config.memory, params["dit"], m, chunk, in_place=True), None

  memory, _ = jax.lax.scan(append, memory, jnp.moveaxis(x[:, :n], 1, 0))
  play = functools.partial(rollout.rollout_chunk, MODEL, config.memory, config.sampler, in_place=True)
  out, _ = play(params["dit"], memory, key, jnp.arange(size))
  tiles = out.mean(1)[..., :3].reshape(size, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(size, 4, 4, 4, 3)
  seen = tiles[jnp.arange(size), truth["place"]]
  score = jnp.einsum("bhwc,khwc->bk", seen, PATTERNS)
  return score.argmax(-1) == truth["identity"]


@command
def main(argv: list[str]) -> None:
  """Trains the arms, prints a table, writes DIR/recall.json."""
  p = Parser(prog="python -m benchmarks.recall", description=__doc__.splitlines()[0])
  p.add_argument("--steps", type=int, default=1000, help="of the dense base; every arm takes half as many more")
  p.add_argument("--hide", type=int, nargs="+", default=[1, 2, 4, 8], help="chunks of cover")
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--out", default="out/recall")
  a: argparse.Namespace = p.parse_args(argv)
  out, began = make_folder(a.out, "--out"), time.perf_counter()
  base = config_of(SPARSE, a.steps, dense=True)
  fresh = {"dit": rollout.init_params(MODEL, a.seed), "text": WordEncoder(MODEL.text_len, MODEL.text_dim).init(a.seed)}
  params = trained(base, fresh, a.seed)
  rows = {}
  for name, memory in ARMS.items():
    config = config_of(memory, a.steps // 2, dense=False)
    own = trained(config, params, a.seed + 1)
    hits = {h: np.asarray(recalled(config, own, jax.random.key(1000 + a.seed), h)) for h in a.hide}
    rows[name] = {h: [round(float(v), 4) for v in (x.mean(), *wilson(int(x.sum()), x.size))] for h, x in hits.items()}
    print(f"{name}: " + ", ".join(f"{h}: {v[0]:.2f}" for h, v in rows[name].items()), flush=True)
  header = f"relay reaches {MODEL.layers * (SPARSE.window - 1)} chunks; chance 0.1; covered for"
  print(f"\n| {header} | " + " | ".join(map(str, a.hide)) + " |\n" + "| --- " * (1 + len(a.hide)) + "|")
  for name, row in rows.items():
    print(f"| {name} | " + " | ".join(f"{v:.2f} ({low:.2f} to {high:.2f})" for v, low, high in row.values()) + " |")
  record = run_record(to_dict(base), flags=vars(a), recall=rows, seconds=round(time.perf_counter() - began, 1))
  write_json_atomic(out / "recall.json", record)


if __name__ == "__main__":
  main(sys.argv[1:])
