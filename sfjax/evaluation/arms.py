"""Arms: models, each with the memory it shall use, and the one compiled step that all of them are measured by.

A step makes a chunk, decodes it and reads it where it is; only readings come to the host, and the pixels of the first few
videos. A step serves every horizon and hiding time, so an arm compiles once.

Letters: B videos, f frames of a chunk, n digits a video may have.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sfjax import instrument, rollout, sampling
from sfjax.codec import DigitsCodec
from sfjax.config import Config, apply_overrides, to_config_dict, to_dataclass
from sfjax.errors import UserError
from sfjax.instrument import Reading
from sfjax.memory import KVMemory
from sfjax.routing import MemoryConfig

SHOWN = 4  # videos whose pixels come to the host


_start = jax.jit(rollout.start, static_argnums=(0, 1, 4))


@dataclasses.dataclass(frozen=True)
class Arm:
  """A model under a name; `memory` is what it runs with."""

  name: str
  sampler: sampling.Sampler
  memory: MemoryConfig

  @property
  def config(self) -> Config:
    """The model's config with the sampler and the memory in use."""
    return dataclasses.replace(self.sampler.config, memory=self.memory)

  def start(self, prompts: list[str], seed: int) -> KVMemory:
    """An empty memory for a batch of prompts."""
    text, null = self.sampler.text(prompts)
    return _start(self.config.model, self.memory, self.sampler.parts.dit, text, seed, null)


def load_arm(text: str, steps: int | None, guidance: float | None) -> Arm:
  """NAME=DIR[,attention=...][,routing=...][,commit=...][,linear=...][,key=value of MemoryConfig...] as a loaded model.

  Raises:
    UserError: not of this form, no such model, an unknown key or value.
  """
  name, equals, rest = text.partition("=")
  directory, *parts = rest.split(",")
  overrides = dict(part.partition("=")[::2] for part in parts)
  if not (equals and name and directory and all(overrides.values())):
    raise UserError(f"--arm: {text!r}; want NAME=DIR[,attention=window][,importance=random]...")
  attention = overrides.pop("attention", "sparse")
  if attention not in sampling.ATTENTION:
    raise UserError(f"--arm {name}: attention={attention}; want one of {', '.join(sampling.ATTENTION)}")
  own = {key: overrides.pop(key) for key in ("routing", "commit", "linear") if key in overrides}
  try:
    sampler = sampling.Sampler(directory, attention, steps=steps, guidance=guidance, **own)
    config = to_config_dict(sampler.config)
    apply_overrides(config, {f"memory.{key}": value for key, value in overrides.items()})
    memory = to_dataclass(Config, config).memory
  except UserError as e:
    raise UserError(f"--arm {name}: {str(e).replace('--config.memory.', '')}") from e
  return Arm(name, sampler, memory)


class View(NamedTuple):
  """What a chunk shows.

  Attributes:
    reading: of [B,f,n]. pixels: of the first videos.
    edges: mean squared difference of neighbouring pixels' brightness, in 0..1.
  """

  reading: Reading
  edges: Float[Array, "B f"]
  pixels: UInt8[Array, "s f h w 3"]


@jax.jit
def look(classifier: dict, pixels: UInt8[Array, "B f h w 3"], colours: Int[Array, "B n"]) -> View:
  """Reads every frame in every colour asked for."""
  lead = (*pixels.shape[:2], colours.shape[1])
  frames = jnp.broadcast_to(pixels[:, :, None], (*lead, *pixels.shape[2:]))
  flat = instrument.classify(
    classifier, frames.reshape(-1, *pixels.shape[2:]), jnp.broadcast_to(colours[:, None], lead).reshape(-1)
  )
  brightness = pixels.astype(jnp.float32).mean(-1) / 255
  edges = sum((jnp.diff(brightness, axis=axis) ** 2).mean((2, 3)) for axis in (2, 3))
  return View(jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), flat), edges, pixels[:SHOWN])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _step(config: Config, memory_config: MemoryConfig, params, classifier, memory, key, samples, colours):
  """One chunk: (memory, view of 12 frames); of the video's first chunk the first 3 frames are not part of it."""
  first = memory.chunk[0] == 0
  latents, memory = rollout.rollout_chunk(
    config.model, memory_config, config.sampler, params, memory, key, samples, in_place=True
  )
  codec = DigitsCodec()
  later = codec.decode(latents, first=False)
  opening = jnp.pad(codec.decode(latents, first=True), ((0, 0), (codec.time - 1, 0), (0, 0), (0, 0), (0, 0)))
  return memory, look(classifier, jnp.where(first, opening, later), colours)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _append(model, memory_config: MemoryConfig, params, memory, latents):
  return rollout.append_chunk(model, memory_config, params, memory, latents, in_place=True)


def append(arm: Arm, memory: KVMemory, pixels: UInt8[np.ndarray, "B F h w 3"]) -> KVMemory:
  """Puts whole chunks of a real video into a memory. The memory passed in is consumed."""
  latents = arm.sampler.parts.encode(pixels)
  frames = arm.config.model.chunk_frames
  for i in range(0, latents.shape[1], frames):
    memory = _append(arm.config.model, arm.memory, arm.sampler.parts.dit, memory, latents[:, i : i + frames])
  return memory


def roll(
  arm: Arm,
  classifier: dict,
  memory: KVMemory,
  key: Array,
  samples: Int[np.ndarray, " B"],
  colours: Int[np.ndarray, "B n"],
  chunks: int,
  advance=lambda: None,
) -> tuple[KVMemory, View]:
  """The next chunks and all their frames' readings, on the host. The memory passed in is consumed.

  Args:
    samples: index of every video, for its noise. advance: called after every chunk.
  """
  views, start = [], int(memory.chunk[0])
  for _ in range(chunks):
    memory, view = _step(
      arm.sampler.config, arm.memory, arm.sampler.parts.dit, classifier, memory, key, samples, colours
    )
    views.append(jax.device_get(view))
    advance()
  whole = jax.tree.map(lambda *x: np.concatenate(x, 1), *views)
  if start == 0:
    whole = jax.tree.map(lambda x: x[:, DigitsCodec().time - 1 :], whole)
  return memory, whole
