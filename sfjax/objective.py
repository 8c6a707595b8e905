"""The objective: flow matching under teacher forcing, with the native memory switched on.

One forward sees a clip twice: clean chunks, which write the memory, and noisy chunks, which read it as a rollout would. The
last clean chunk would be read by nobody and is left out. A bidirectional model is the case of one chunk, as long as a clip.
Letters: B clips, n chunks, F latent frames of a chunk, h, w, C a latent frame.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from sfjax import captions, rollout
from sfjax.attention import parallel_attention
from sfjax.axes import all_chunks, own_chunks, splits_chunks
from sfjax.config import Config, Stage
from sfjax.flow import TIMESTEPS, add_noise, flow_loss, shift_sigma
from sfjax.memory import layer_rng
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig


def stage_memory(memory: MemoryConfig, stage: Stage, chunks: int) -> MemoryConfig:
  """The memory a stage trains with: the native one, or the whole clip, of so many chunks, as the window."""
  return memory.of_window(chunks) if stage.dense else memory


def clip_keys(key: Array, index: Int32[Array, " B"]) -> Array:
  """A key for each clip of a step's batch, by its place in the whole of it: what is drawn does not depend on the mesh."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def cut(model: ModelConfig, keys: Array, latents: Float[Array, "B T h w C"]) -> Float[Array, "B n F h w C"]:
  """Whole chunks of a clip, its last ones half the time, else from its beginning, by clip; where it divides, all of it.

  The beginning counts half, since it alone has a latent of a single frame.
  """
  n, spare = divmod(latents.shape[1], model.chunk_frames)
  if spare:
    late = jax.vmap(lambda key: jax.random.bernoulli(key, shape=(1, 1, 1, 1)))(keys)
    latents = jnp.where(late, latents[:, spare:], latents[:, :-spare])
  return latents.reshape(latents.shape[0], n, model.chunk_frames, *latents.shape[2:])


def teacher_forced(
  config: Config,
  stage: Stage,
  params: dict,
  context: Float[Array, "B n-1 F h w C"],
  level: Float[Array, "B n-1 F"],
  noisy: Float[Array, "B n F h w C"],
  sigma: Float[Array, "B n F"],
  prompt: captions.Rows,
  keys: Array,
) -> tuple[Float[Array, "B n F h w C"], Float[Array, ""]]:
  """The network's output for noisy chunks that read a clean context of that noise level, and the importance head's loss.

  keys: of the clips, see `memory.layer_rng`.
  """
  model, n = config.model, noisy.shape[1]
  chunk, apart = jnp.arange(n), splits_chunks(n)
  if apart:
    # A device has as many clean chunks as noisy ones, so that the last clean one, which nobody reads, is there, too.
    last = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
    context, level, noisy, sigma = (own_chunks(x, 1) for x in (last(context), last(level), noisy, sigma))
    chunk = own_chunks(chunk, 0)
  given = context.shape[1]
  out, _, plan = rollout.apply(
    model,
    params["dit"],
    jnp.concatenate([context, noisy], 1),
    jnp.concatenate([level, sigma], 1) * TIMESTEPS,
    jnp.concatenate([chunk[:given], chunk]),
    captions.kv(model, params, prompt),
    parallel_attention(model, stage_memory(config.memory, stage, n), n, later=min(config.memory.window, n)),
    layer_rng(keys, model.layers),
  )
  out = out[:, given:]
  return all_chunks(out, 1) if apart else out, plan.importance_loss.mean()


def loss(
  config: Config,
  stage: Stage,
  params: dict,
  latents: Float[Array, "B T h w C"],
  text: captions.Text,
  key: Array,
  index: Int32[Array, " B"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Mean velocity error of the noisy frames, a mean over clips, and the importance head's auxiliary loss.

  Args:
    params: "dit", and what is trained beside it. latents: clean, see `cut`. text: of the clips.
    key: of the step. index: places of the clips in the step's whole batch.

  Returns:
    The loss, and its parts as metrics.
  """
  model, train = config.model, config.train
  draws = iter(jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 10))(clip_keys(key, index)), 1, 0))
  draw = lambda kind, *shape: jax.vmap(lambda k: kind(k, shape))(next(draws))
  uniform = functools.partial(draw, jax.random.uniform)

  x0 = cut(model, next(draws), latents)
  n = x0.shape[1]
  sigma = jnp.broadcast_to(shift_sigma(uniform(n), train.shift)[..., None], x0.shape[:3])
  least = min(1, model.chunk_frames - 1)  # of a chunk of one frame none is known
  first_known = draw(lambda k, shape: jax.random.randint(k, shape, least, model.chunk_frames), n, 1)
  known = (uniform(n, 1) < train.p_known) & (jnp.arange(model.chunk_frames) < first_known)
  sigma = jnp.where(known, 0.0, sigma)
  noise = draw(jax.random.normal, *x0.shape[1:])
  noisy = add_noise(x0, noise, sigma)

  # The clean half is noised half the time, so that the model survives its own errors; its timestep tells.
  level = uniform(n) * train.context_noise * (uniform(1) < train.p_context_noise)
  level = jnp.broadcast_to(level[..., None], sigma.shape)[:, :-1]
  context = add_noise(x0[:, :-1], draw(jax.random.normal, n - 1, *x0.shape[2:]), level)

  prompt = text.dropped(uniform(1)[:, 0] < train.p_drop_prompt).prompt
  out, aux = teacher_forced(config, stage, params, context, level, noisy, sigma, prompt, next(draws))
  frames = flow_loss(model, out, noisy, x0, noise, sigma)
  # A mean by clip; a chunk's last frame is never known.
  flow = (jnp.where(known, 0.0, frames).sum((1, 2)) / (~known).sum((1, 2))).mean()
  total = flow + train.importance_weight * aux
  return total, {"loss": total, "flow": flow, "importance": aux}
