"""The rollout: begin a chunk, denoise it against the memory, commit it; chunk after chunk, for sampling and training alike.

Letters: B videos, F latent frames of a chunk, h, w, C a latent frame, L layers, M text rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from sfjax import memory as kv
from sfjax.attention import cached_attention
from sfjax.flow import TIMESTEPS, SamplerConfig, denoise
from sfjax.model import DiT, ModelConfig
from sfjax.routing import MemoryConfig


@functools.cache
def _abstract(model: ModelConfig):
  """Structure and abstract weights of the DiT."""
  return nnx.split(nnx.eval_shape(lambda: DiT(model, nnx.Rngs(params=0))))


def _module(model: ModelConfig, params) -> DiT:
  graph, state = _abstract(model)
  state = jax.tree.map(lambda x: x, state)  # a fresh container: the cached one stays abstract
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


def apply(model: ModelConfig, params, *args):
  """`DiT.__call__` as a function of its parameters (a pure dict)."""
  return _module(model, params)(*args)


def abstract_params(model: ModelConfig) -> dict:
  """Shapes and dtypes of the parameters as a pure dict."""
  return nnx.to_pure_dict(_abstract(model)[1])


def init_params(model: ModelConfig, seed: int = 0) -> dict:
  """Random weights as a pure dict (self_forcing section 1.6)."""
  return nnx.to_pure_dict(nnx.state(DiT(model, nnx.Rngs(params=jax.random.key(seed, impl="rbg")))))


def start(
  model: ModelConfig, cfg: MemoryConfig, params, text: Float[Array, "B M E"], seed: int = 0, null_text=None
) -> kv.KVMemory:
  """An empty memory for a batch of prompts. With null_text (guidance) the batch is doubled: prompts first."""
  rows = text if null_text is None else jnp.concatenate([text, jnp.broadcast_to(null_text, text.shape)])
  return kv.init_memory(model, cfg, text_kv(model, params, rows), seed)


def text_kv(model: ModelConfig, params, text: Float[Array, "B M E"]):
  """Cross-attention K/V of every layer, [L,B,M,N,H] twice."""
  return _module(model, params).text_kv(text)


def set_prompt(
  model: ModelConfig, params, memory: kv.KVMemory, text: Float[Array, "B M E"], null_text=None
) -> kv.KVMemory:
  """The same memory under another prompt, from the next chunk on."""
  rows = text if null_text is None else jnp.concatenate([text, jnp.broadcast_to(null_text, text.shape)])
  k, v = text_kv(model, params, rows)
  return memory.replace(cross_k=k, cross_v=v)


def chunk_keys(key: Array, sample: Int32[Array, "B"], chunk: Int32[Array, ""]) -> Array:
  """A key for each (run, sample, chunk), so that noise does not depend on the batch."""
  return jax.vmap(lambda s: jax.random.fold_in(jax.random.fold_in(key, s), chunk))(sample)


def _forward(model, cfg, params, memory: kv.KVMemory, x, sigma, commit: bool):
  """One pass of one chunk over the memory; x [rows,F,h,w,C]."""
  out, aux = apply(
    model,
    params,
    x[:, None],
    sigma[:, None] * TIMESTEPS,
    memory.chunk[:1],
    (memory.cross_k, memory.cross_v),
    cached_attention(model, cfg, commit),
    memory,
  )
  return out[:, 0], aux


def commit(
  model: ModelConfig, cfg: MemoryConfig, params, memory: kv.KVMemory, x0: Float[Array, "B F h w C"]
) -> kv.KVMemory:
  """The clean pass over a begun chunk: final K/V and new scores. Under guidance both rows get the same latents."""
  rows = memory.k.shape[1]
  x0 = jnp.concatenate([x0] * (rows // x0.shape[0]))
  _, update = _forward(model, cfg, params, memory, x0, jnp.zeros(x0.shape[:2]), commit=True)
  return kv.per_layer(kv.commit_chunk, model, cfg, memory, update)


def append_chunk(model: ModelConfig, cfg: MemoryConfig, params, memory: kv.KVMemory, x0) -> kv.KVMemory:
  """Puts a given clean chunk (a real prefix, say) into the memory."""
  return commit(model, cfg, params, kv.per_layer(kv.begin_chunk, model, cfg, memory), x0)


def rollout_chunk(
  model: ModelConfig,
  cfg: MemoryConfig,
  sampler: SamplerConfig,
  params,
  memory: kv.KVMemory,
  key: Array,
  sample: Int32[Array, "B"],
  known: Float[Array, "B F h w C"] | None = None,
  known_frames: Bool[Array, "F"] | None = None,
) -> tuple[Float[Array, "B F h w C"], kv.KVMemory]:
  """Begin, denoise, commit: one chunk of clean latents and the memory that contains it.

  Args:
    memory: of 2B rows (prompts, then null prompts) if sampler.guidance != 1.
    key: of the run; sample: index of every video, so that its noise does not depend on the batch.
    known, known_frames: conditioning latents, held at timestep 0 inside the chunk.
  """
  memory = kv.per_layer(kv.begin_chunk, model, cfg, memory)
  keys = chunk_keys(key, sample, memory.chunk[0])
  shape = (model.chunk_frames, *model.latent_size, model.latent_channels)
  noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)
  guided = sampler.guidance != 1

  def predict(x, sigma):
    if not guided:
      return _forward(model, cfg, params, memory, x, sigma, commit=False)[0]
    out, _ = _forward(
      model, cfg, params, memory, jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma]), commit=False
    )
    with_prompt, without = jnp.split(out, 2)
    return without + sampler.guidance * (with_prompt - without)

  x0 = denoise(model, sampler, predict, noise, keys, known, known_frames)
  return x0, commit(model, cfg, params, memory, x0)


def rollout(
  model: ModelConfig,
  cfg: MemoryConfig,
  sampler: SamplerConfig,
  params,
  memory: kv.KVMemory,
  key: Array,
  sample: Int32[Array, "B"],
  chunks: int,
) -> tuple[Float[Array, "B n F h w C"], kv.KVMemory]:
  """`chunks` chunks in one scan. Differentiable: a chunk's gradient flows through the memory."""

  def step(m, _):
    x0, m = rollout_chunk(model, cfg, sampler, params, m, key, sample)
    return m, x0

  memory, x = jax.lax.scan(step, memory, length=chunks)
  return jnp.moveaxis(x, 0, 1), memory


@dataclasses.dataclass(frozen=True)
class Compiled:
  """The rollout's three programs, jitted whole, the memory donated."""

  model: ModelConfig
  memory: MemoryConfig
  sampler: SamplerConfig

  @functools.cached_property
  def chunk(self):
    """(params, memory, key, sample, known, known_frames) -> (latents, memory)."""
    return jax.jit(functools.partial(rollout_chunk, self.model, self.memory, self.sampler), donate_argnums=1)

  @functools.cached_property
  def append(self):
    """(params, memory, x0) -> memory."""
    return jax.jit(functools.partial(append_chunk, self.model, self.memory), donate_argnums=1)

  @functools.cached_property
  def start(self):
    """(params, text, seed, null_text) -> memory."""
    return jax.jit(functools.partial(start, self.model, self.memory), static_argnums=2)
