"""The objective: flow matching under teacher forcing, with the native memory switched on.

One forward sees a clip twice: clean chunks, which write the memory, and noisy chunks, which read it as a rollout would. The
last clean chunk would be read by nobody and is left out. A bidirectional model is the case of one chunk, as long as a clip.
Letters: B clips, n chunks, F latent frames of a chunk, h, w, C a latent frame, M words.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from sfjax import rollout
from sfjax.attention import parallel_attention
from sfjax.config import Config, Stage
from sfjax.flow import TIMESTEPS, add_noise, flow_loss, shift_sigma
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig
from sfjax.text import WordEncoder


def stage_memory(memory: MemoryConfig, stage: Stage) -> MemoryConfig:
  """The memory a stage trains with: the native one, or the whole clip as the window."""
  if not stage.dense:
    return memory
  return memory.of_window(stage.chunks)


def cut(model: ModelConfig, key: Array, latents: Float[Array, "B T h w C"]) -> Float[Array, "B n F h w C"]:
  """Whole chunks of a clip, its last ones half the time, else from its beginning, by clip; where it divides, all of it.

  The beginning counts half, since it alone has a latent of a single frame.
  """
  n, spare = divmod(latents.shape[1], model.chunk_frames)
  if spare:
    late = jax.random.bernoulli(key, shape=(latents.shape[0], 1, 1, 1, 1))
    latents = jnp.where(late, latents[:, spare:], latents[:, :-spare])
  return latents.reshape(latents.shape[0], n, model.chunk_frames, *latents.shape[2:])


def loss(
  config: Config,
  stage: Stage,
  params: dict,
  latents: Float[Array, "B T h w C"],
  words: Int32[Array, "B M"],
  key: Array,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Mean velocity error of the noisy frames, and the importance head's auxiliary loss.

  Args:
    params: {"dit", "text"}. latents: clean, see `cut`. words: token ids of the captions.

  Returns:
    The loss, and its parts as metrics.
  """
  model, train = config.model, config.train
  x0 = cut(model, jax.random.fold_in(key, 2), latents)
  b, n = x0.shape[:2]
  memory = stage_memory(config.memory, stage)
  keys = iter(jax.random.split(key, 8))
  uniform = lambda *shape: jax.random.uniform(next(keys), shape)

  sigma = jnp.broadcast_to(shift_sigma(uniform(b, n), train.shift)[..., None], x0.shape[:3])
  first_known = jax.random.randint(next(keys), (b, n, 1), 1, model.chunk_frames)
  known = (uniform(b, n, 1) < train.p_known) & (jnp.arange(model.chunk_frames) < first_known)
  sigma = jnp.where(known, 0.0, sigma)
  noise = jax.random.normal(next(keys), x0.shape)
  noisy = add_noise(x0, noise, sigma)

  # The clean half is noised half the time, so that the model survives its own errors; its timestep tells.
  level = uniform(b, n) * train.context_noise * (uniform(b, 1) < train.p_context_noise)
  level = jnp.broadcast_to(level[..., None], sigma.shape)[:, :-1]
  context = add_noise(x0[:, :-1], jax.random.normal(next(keys), x0[:, :-1].shape), level)

  words = jnp.where(uniform(b, 1) < train.p_drop_prompt, 0, words)
  text = WordEncoder(model.text_len, model.text_dim).encode(params["text"], words)
  kv = rollout.text_kv(model, params["dit"], text)
  rng = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.fold_in(key, 1), model.layers))
  out, _, plan = rollout.apply(
    model,
    params["dit"],
    jnp.concatenate([context, noisy], 1),
    jnp.concatenate([level, sigma], 1) * TIMESTEPS,
    jnp.concatenate([jnp.arange(n - 1), jnp.arange(n)]),
    kv,
    parallel_attention(model, memory, n, later=min(config.memory.window, n)),
    rng,
  )
  frames = flow_loss(model, out[:, n - 1 :], noisy, x0, noise, sigma)
  flow = jnp.where(known, 0.0, frames).sum() / jnp.maximum((~known).sum(), 1)
  aux = plan.importance_loss.mean()
  total = flow + train.importance_weight * aux
  return total, {"loss": total, "flow": flow, "importance": aux}
