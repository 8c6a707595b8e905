"""What a GPU's kernels cost in accuracy: whole chunks against float32, beside the same chunks without these kernels.

python -m benchmarks.accuracy --config configs/wan_1_3b.py --out out/accuracy [--config.memory.persistent=60 ..]

Random weights of full width in a few layers; every chunk is denoised and committed as in sampling. The lists that float32 chose
are handed to both, and after each chunk its scores, so that P is the same: what differs is rounding. "kernels" is the config's
dtype as it is sampled with; "plain" the same without any of `pallas_kernels`' own kernels. Numbers
are the relative L2 distance of a chunk's latents from float32's (products at the highest precision).
"""

import contextlib
import dataclasses
import functools
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.realtime import random_text, random_weights
from pallas_kernels.add_norm import mosaic_sm90 as add_norm
from pallas_kernels.few_keys import mosaic_sm90 as few_keys
from pallas_kernels.gelu_linear import mosaic_sm90 as gelu_linear
from pallas_kernels.pbsa import mosaic_sm90 as pbsa
from pallas_kernels.slots import mosaic_sm90 as slots
from sfjax import memory as kv
from sfjax import rollout
from sfjax.config import Config, read_config, split_overrides, to_dict
from sfjax.errors import Parser, UserError, check_flags, command
from sfjax.flow import few_step, to_x0
from sfjax.model import ModelConfig
from sfjax.runlog import make_folder, run_record, write_json_atomic

KEY = jax.random.key(7)


def chunk(model: ModelConfig, config: Config, params, memory: kv.KVMemory, given=None):
  """One chunk of a few-step sampler, reading by the lists given for each pass, or its own: (latents, memory, lists)."""
  cfg, sampler, told = config.memory, config.sampler, []
  memory, how = rollout._begin(model, cfg, memory, in_place=True)
  keys = rollout.chunk_keys(KEY, jnp.arange(1), memory.chunk[0])
  x = rollout._first_noise(model, keys)
  level = lambda sigma: jnp.full(x.shape[:2], sigma)
  for i, sigma in enumerate(sampler.sigmas[:-1]):
    lists = None if given is None else given[i]
    out, memory, (read, _) = rollout._forward(
      model, cfg, params, memory, x, level(sigma), False, keep=True, lists=lists, **how
    )
    told.append((read.ids, read.counts))
    x0, x = to_x0(model, out, x, level(sigma)), few_step(model, sampler, x, out, i, keys)
  lists = None if given is None else given[-1]
  over = rollout._pass(model, cfg, memory, x0, level(0.0), True, keep=True, lists=lists, **how)
  carry, (read, update) = rollout.attended(model, params, *over)
  told.append((read.ids, read.counts))
  return x0, kv.per_layer(kv.commit_chunk, model, cfg, memory.replace(**carry), update), told


def play(model: ModelConfig, config: Config, params, text, chunks: int, lists=None, scores=None):
  """So many chunks: their latents, lists and the memory's scores behind each; those given take the place of its own."""
  one = jax.jit(functools.partial(chunk, model, config))
  memory = jax.jit(functools.partial(rollout.start, model, config.memory))(params, text)
  made, told, left = [], [], []
  for t in range(chunks):
    x, memory, read = one(params, memory, lists and lists[t])
    memory = memory.replace(score=scores[t]) if scores else memory
    made.append(np.asarray(x, np.float64))
    told.append(read)
    left.append(memory.score)
  return made, told, left


@contextlib.contextmanager
def without_kernels():
  """No call takes a kernel of this package."""
  with contextlib.ExitStack() as stack:
    for module in (pbsa, slots, few_keys, gelu_linear, add_norm):
      stack.enter_context(mock.patch.object(module, "unsupported", lambda *_: "asked not to"))
    yield


@command
def main(argv: list[str]) -> None:
  """Measures both and writes DIR/accuracy.json."""
  rest, overrides = split_overrides(argv)
  p = Parser(prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0])
  p.add_argument("--config", default="configs/wan_1_3b.py", metavar="FILE[:VARIANT]")
  p.add_argument("--layers", type=int, default=4)
  p.add_argument("--chunks", type=int, default=5, help="P is there from the fourth on, with a window of 3")
  p.add_argument("--words", type=int, default=40, help="rows of the prompt")
  p.add_argument("--out", default="out/accuracy")
  a = p.parse_args(rest)
  config = read_config(a.config, overrides)
  check_flags(a, ("layers", 1, config.model.layers), ("chunks", 1, 100), ("words", 0, config.model.text_len))
  if wrong := rollout.untrainable(config.sampler):
    raise UserError(f"--config: sampler of {wrong}")
  out = make_folder(a.out, "--out")
  model = dataclasses.replace(config.model, layers=a.layers, param_dtype=config.model.dtype)
  wide = dataclasses.replace(model, dtype="float32", param_dtype="float32")
  params = random_weights(rollout.abstract_params(model), 0)
  text = random_text(model, a.words, 3)
  with jax.default_matmul_precision("highest"):
    want, *given = play(wide, config, jax.tree.map(lambda x: x.astype(jnp.float32), params), text, a.chunks)
  found = {}
  for name, how in (("kernels", contextlib.nullcontext), ("plain", without_kernels)):
    with how():
      made, *_ = play(model, config, params, text, a.chunks, *given)
    found[name] = [float(np.linalg.norm(x - w) / np.linalg.norm(w)) for x, w in zip(made, want, strict=True)]
    print(f"{name:8s} {' '.join(f'{x:.5f}' for x in found[name])}", flush=True)
  write_json_atomic(out / "accuracy.json", run_record(to_dict(config), flags=vars(a), **found, protocol=__doc__))


if __name__ == "__main__":
  main(sys.argv[1:])
