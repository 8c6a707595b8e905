"""The flow between data and noise: x_sigma = (1 - sigma) x0 + sigma noise, sigma in [0, 1], timestep = 1000 sigma.

Everything that knows what the network's output means lives here: training loss, sampling steps, schedules.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sfjax.errors import check
from sfjax.model import ModelConfig

TIMESTEPS = 1000.0
_MIN_SIGMA = 0.1  # an x0-predicting network's velocity error is its x0 error over sigma: bounded near sigma = 0
SAMPLERS = ("euler", "few_step")
ROUTING = ("step", "chunk")
COMMITS = ("clean", "last")


def shift_sigma(sigma, shift: float):
  """Moves mass towards noise: s sigma / (1 + (s - 1) sigma)."""
  return shift * sigma / (1 + (shift - 1) * sigma)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How a chunk is denoised.

  Attributes:
    kind: "euler", steps along the flow; "few_step", each step predicts x0 and re-noises it (self_forcing section 3.3).
    steps: network evaluations per chunk, the commit pass apart.
    shift: timestep shift of the schedule.
    guidance: classifier-free guidance weight; 1 runs the conditional branch alone.
    routing: "step", each step finds what it reads; "chunk", the first step's lists serve the chunk's later steps.
    commit: whose K/V and scores the memory keeps of a chunk: "clean", those of a pass over its clean latents; "last", those of
      the last step, at the noise that it saw, which saves that pass; a given chunk's are clean.
    last_sigma: the last step's noise, with either commit; 0 for the schedule's. The less of it, the clearer what is kept.
  """

  kind: str = "euler"
  steps: int = 20
  shift: float = 5.0
  guidance: float = 1.0
  routing: str = "step"
  commit: str = "clean"
  last_sigma: float = 0.0

  def __post_init__(self):
    check(
      self,
      ("kind", self.kind in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
      ("steps", self.steps >= 1, "at least 1"),
      ("shift", 0 < self.shift < math.inf, "a positive number"),
      ("guidance", 0 <= self.guidance < math.inf, "0 or more"),
      ("routing", self.routing in ROUTING, f"one of {', '.join(ROUTING)}"),
      ("commit", self.commit in COMMITS, f"one of {', '.join(COMMITS)}"),
    )
    if self.last_sigma and not (self.steps > 1 and 0 < self.last_sigma < self.sigmas[-3]):
      want = f"above 0 and below {self.sigmas[-3]:.3g}" if self.steps > 1 else "more than one step"
      raise ValueError(f"last_sigma: {self.last_sigma:g}; want {want}, or 0 for the schedule's")

  @property
  def passes(self) -> int:
    """Network passes that a chunk takes, its commit included."""
    return self.steps + (self.commit == "clean")

  @property
  def sigmas(self) -> np.ndarray:
    """Noise levels visited, from 1 down to 0, [steps + 1]."""
    sigmas = shift_sigma(np.linspace(1.0, 0.0, self.steps + 1), self.shift).astype(np.float32)
    if self.last_sigma:
      sigmas[-2] = self.last_sigma
    return sigmas


def _expand(sigma: Float[Array, "*B"], x: Float[Array, "*B h w C"]):
  return sigma[..., None, None, None]


def add_noise(x0: Float[Array, "*B h w C"], noise: Float[Array, "*B h w C"], sigma: Float[Array, "*B"]):
  """x_sigma of every latent frame."""
  s = _expand(sigma, x0)
  return (1 - s) * x0 + s * noise


def to_x0(model: ModelConfig, out: Float[Array, "*B h w C"], x: Float[Array, "*B h w C"], sigma: Float[Array, "*B"]):
  """The clean latents that a network output stands for."""
  return out if model.prediction == "x0" else x - _expand(sigma, x) * out


def to_velocity(model: ModelConfig, out, x, sigma):
  """noise - x0, the direction in which sigma grows; sigma > 0."""
  return out if model.prediction == "flow" else (x - out) / _expand(sigma, x)


def flow_loss(
  model: ModelConfig,
  out: Float[Array, "*B h w C"],
  x: Float[Array, "*B h w C"],
  x0: Float[Array, "*B h w C"],
  noise: Float[Array, "*B h w C"],
  sigma: Float[Array, "*B"],
) -> Float[Array, "*B"]:
  """Mean squared velocity error of every latent frame."""
  if model.prediction == "x0":  # the same error, with sigma bounded from below
    error = (out - x0) / jnp.maximum(_expand(sigma, x), _MIN_SIGMA)
  else:
    error = out - (noise - x0)
  return (error.astype(jnp.float32) ** 2).mean((-3, -2, -1))


def few_step(model: ModelConfig, sampler: SamplerConfig, x, out, i, key: Array):
  """After step i: the clean latents that the network saw in x, re-noised to the next level (self_forcing section 3.3).

  Args:
    x [B,F,h,w,C]; out: the network's output for it. key: a key for each row [B].
  """
  x0 = to_x0(model, out, x, jnp.full(x.shape[:2], jnp.asarray(sampler.sigmas)[i]))
  return renoise(sampler, x0, i + 1, key)


def renoise(sampler: SamplerConfig, x0: Float[Array, "B F h w C"], i, key: Array) -> Float[Array, "B F h w C"]:
  """Clean latents at step i's level, with that step's noise, whatever step predicted them; key: a key for each row [B]."""
  fresh = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), x0.shape[1:], x0.dtype))(key)
  return add_noise(x0, fresh, jnp.full(x0.shape[:2], jnp.asarray(sampler.sigmas)[i]))


def denoise(
  model: ModelConfig,
  sampler: SamplerConfig,
  predict,
  noise,
  key: Array,
  known=None,
  known_frames=None,
  state=None,
  steps: range | None = None,
):
  """Denoises one chunk.

  Args:
    predict: (x [B,F,h,w,C], sigma [B,F], state) -> (network output, guidance included; state).
    noise: the starting noise [B,F,h,w,C], or what the steps before made of it. key: a key for each row [B], for re-noising.
    known: clean latents of conditioning frames; known_frames: bool [F], which of them are given. Known frames are held at
      sigma 0 throughout. state: a pytree that goes from step to step.
    steps: which of the sampler's to do, all by default. A lone one may return a state of another form.

  Returns:
    Latents [B,F,h,w,C] after those steps, clean after the sampler's last one, and the state.
  """
  sigmas = jnp.asarray(sampler.sigmas)
  frames = noise.shape[:2]

  def clamp(x):
    return x if known is None else jnp.where(known_frames[:, None, None, None], known, x)

  def level(sigma):
    s = jnp.full(frames, sigma)
    return s if known is None else jnp.where(known_frames, 0.0, s)

  def euler(x, out, i):
    v = to_velocity(model, out, x, jnp.full(frames, sigmas[i]))
    return x + (sigmas[i + 1] - sigmas[i]) * v

  def step(carry, i):
    x, state = carry
    x = clamp(x)
    out, state = predict(x, level(sigmas[i]), state)
    x = euler(x, out, i) if sampler.kind == "euler" else few_step(model, sampler, x, out, i, key)
    return (x, state), None

  steps = range(sampler.steps) if steps is None else steps
  if len(steps) == 1:
    (x, state), _ = step((noise, state), steps[0])
  else:
    (x, state), _ = jax.lax.scan(step, (noise, state), jnp.asarray(steps))
  return clamp(x), state
