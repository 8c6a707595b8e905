"""Distribution matching: a student's own clips, judged by two denoisers, one of real clips and one of the student's.

Where both denoise a noised clip alike, the student makes what real clips are; where they differ, the difference is the
direction in which the clip is too much the student's (self_forcing sections 4.3 and 4.4). What is a defect there is not here:
noise is added and taken away with one and the same sigma.

Keys are one for each clip. A denoiser: (x [B,T,h,w,C], sigma [B,T]) -> clean latents.

Letters: B clips, T latent frames, h, w, C a latent frame.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sfjax import rollout
from sfjax.attention import parallel_attention
from sfjax.flow import TIMESTEPS, add_noise, flow_loss, shift_sigma, to_x0
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig

LEVELS = 0.02, 0.98  # of sigma: beyond them, denoisers of 21 latents usually say little about what is real
Denoiser = Callable[[Float[Array, "B T h w C"], Float[Array, "B T"]], Float[Array, "B T h w C"]]


def whole_clip(model: ModelConfig, params, text_kv, x: Float[Array, "B T h w C"], sigma: Float[Array, "B T"]):
  """The output of a bidirectional model, one chunk of which is the whole clip: T = model.chunk_frames."""
  attend = parallel_attention(model, MemoryConfig(window=1), 1)
  chunk = jnp.zeros(1, jnp.int32)
  return rollout.apply(model, params, x[:, None], sigma[:, None] * TIMESTEPS, chunk, text_kv, attend)[0][:, 0]


def denoiser(model: ModelConfig, params, text_kv, null_kv=None, guidance: float = 1.0) -> Denoiser:
  """A bidirectional model as a denoiser; with guidance, away from what it makes of the null prompt's K/V."""
  guided = guidance != 1
  if guided:  # both in one pass
    text_kv = jax.tree.map(lambda *kv: jnp.concatenate(kv, 1), text_kv, null_kv)

  def denoise(x, sigma):
    if guided:
      x, sigma = jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma])
    x0 = to_x0(model, whole_clip(model, params, text_kv, x, sigma), x, sigma)
    if not guided:
      return x0
    with_prompt, without = jnp.split(x0, 2)
    return without + guidance * (with_prompt - without)

  return denoise


def noised(keys: Key[Array, "B"], x: Float[Array, "B T h w C"], shift: float, levels: tuple[float, float] = LEVELS):
  """The clips at one noise level each: (noisy, sigma [B,T], noise); uniform before the shift, then within `levels`."""
  places, draws = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  sigma = jnp.clip(shift_sigma(jax.vmap(jax.random.uniform)(places), shift), *levels)
  sigma = jnp.broadcast_to(sigma[:, None], x.shape[:2])
  noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(draws)
  return add_noise(x, noise, sigma), sigma, noise


def dmd_loss(
  keys: Key[Array, "B"],
  x: Float[Array, "B T h w C"],
  real: Denoiser,
  fake: Denoiser,
  shift: float = 5.0,
  levels: tuple[float, float] = LEVELS,
):
  """Half the squared distance of x to where x would go; its gradient in x is (fake - real) / mean |x - real| / x.size.

  Returns the loss and metrics: how large that direction is, and the share of clips whose is not finite (they get none).
  """
  constant = jax.lax.stop_gradient(x)
  noisy, sigma, _ = noised(keys, constant, shift, levels)
  real_x0, fake_x0 = real(noisy, sigma), fake(noisy, sigma)
  scale = jnp.abs(constant - real_x0).mean((1, 2, 3, 4), keepdims=True)
  direction = jax.lax.stop_gradient((fake_x0 - real_x0) / scale)
  finite = jnp.isfinite(direction).all((1, 2, 3, 4), keepdims=True)
  direction = jnp.where(finite, direction, 0)
  loss = 0.5 * ((x - (constant - direction)) ** 2).mean()
  return loss, {"direction": jnp.abs(direction).mean(), "not_finite": (~finite).mean()}


def sid_loss(
  keys: Key[Array, "B"],
  x: Float[Array, "B T h w C"],
  real: Denoiser,
  fake: Denoiser,
  shift: float = 5.0,
  levels: tuple[float, float] = LEVELS,
):
  """Score identity distillation (self_forcing section 4.7, alpha = 1); its gradient passes through both denoisers.

  Its value is the mean of (real - fake) (fake - x) / mean |x - real|. Returns the loss and metrics as `dmd_loss` does,
  but a clip that is not finite makes the whole gradient so.
  """
  noisy, sigma, _ = noised(keys, x, shift, levels)
  real_x0, fake_x0 = real(noisy, sigma), fake(noisy, sigma)
  scale = jax.lax.stop_gradient(jnp.abs(x - real_x0).mean((1, 2, 3, 4), keepdims=True))
  gap = (real_x0 - fake_x0) / scale
  clips = (gap * (fake_x0 - x)).mean((1, 2, 3, 4))
  return clips.mean(), {"direction": jnp.abs(gap).mean(), "not_finite": (~jnp.isfinite(clips)).mean()}


STUDENT_LOSSES = {"dmd": dmd_loss, "sid": sid_loss}


def critic_loss(
  keys: Key[Array, "B"],
  x: Float[Array, "B T h w C"],
  model: ModelConfig,
  output,
  shift: float = 5.0,
  levels: tuple[float, float] = LEVELS,
) -> Float[Array, ""]:
  """Flow loss of the fake score on the student's clips; output: (x, sigma) -> what the network returns."""
  x = jax.lax.stop_gradient(x)
  noisy, sigma, noise = noised(keys, x, shift, levels)
  return flow_loss(model, output(noisy, sigma), noisy, x, noise, sigma).mean()
