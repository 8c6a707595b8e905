"""Sampling: from a model folder and a prompt to frames that stream out chunk by chunk; `sample` is sample.py in a notebook."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from sfjax import rollout
from sfjax.config import Config
from sfjax.errors import UserError
from sfjax.memory import KVMemory, memory_bytes
from sfjax.parts import Parts, load_parts
from sfjax.routing import MemoryConfig

SHIPPED = pathlib.Path(__file__).parent.parent / "checkpoints" / "digits"
ATTENTION = ("sparse", "window", "dense")
_DENSE_CHUNKS = 7  # 21 latents, Self-Forcing's cache


def attention_preset(config: Config, name: str) -> MemoryConfig:
  """The model's own memory, a plain window of the same KV bytes, or a dense cache of 21 latents."""
  own, nb = config.memory, config.model.layout.blocks
  if name == "sparse":
    return own
  chunks = _DENSE_CHUNKS if name == "dense" else own.window + round(own.persistent / nb)
  return dataclasses.replace(own, window=chunks, persistent=0, top_k=1.0, sink_chunks=0)


class Sampler:
  """A loaded model with its compiled programs.

  Args:
    model: a model folder, or one that `load_parts` has read. attention: "sparse" (the trained memory), "window" or "dense".
    steps, guidance: override the config's sampler.

  Raises:
    UserError: the folder is absent, damaged or of another config.
  """

  def __init__(self, model=SHIPPED, attention="sparse", steps=None, guidance=None):
    self.parts = model if isinstance(model, Parts) else load_parts(model)
    config = self.parts.config
    changes = {k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None}
    try:
      sampler = dataclasses.replace(config.sampler, **changes)
    except ValueError as e:
      raise UserError(f"--{e}") from e
    self.config = dataclasses.replace(config, memory=attention_preset(config, attention), sampler=sampler)
    self.programs = rollout.Compiled(self.config.model, self.config.memory, sampler)
    self.fps = config.data.fps
    self.size = tuple(n * self.parts.codec.space for n in config.model.latent_size)

  @property
  def kv_bytes(self) -> dict[str, int]:
    """Predicted memory of one video, both guidance rows included."""
    return memory_bytes(self.config.model, self.config.memory, 2 if self.config.sampler.guidance != 1 else 1)

  def text(self, prompts: list[str]):
    """Encoded prompts, and the null prompt if guidance needs it."""
    if self.config.sampler.guidance == 1:
      return self.parts.text(prompts), None
    rows = self.parts.text([*prompts, ""])
    return rows[:-1], rows[-1:]

  def start(self, prompts: list[str], seed: int = 0) -> KVMemory:
    """An empty memory for a batch of prompts."""
    text, null = self.text(prompts)
    return self.programs.start(self.parts.dit, text, seed, null)

  def set_prompt(self, memory: KVMemory, prompts: list[str]) -> KVMemory:
    """Another prompt from the next chunk on."""
    text, null = self.text(prompts)
    return rollout.set_prompt(self.config.model, self.parts.dit, memory, text, null)

  def stream(
    self,
    memory: KVMemory,
    frames: int,
    seed: int,
    samples: list[int],
    prefix: UInt8[np.ndarray, "B F h w 3"] | None = None,
    schedule: dict[int, list[str]] | None = None,
    seconds: list[tuple[float, float]] | None = None,
    decoded: Any = None,
  ) -> Iterator[tuple[UInt8[np.ndarray, "B F h w 3"], KVMemory, Any]]:
    """Frames chunk by chunk, with the memory and the codec's state after each chunk; those passed in are consumed.

    Args:
      frames: how many to make; the last chunk is trimmed.
      samples: index of every video of the batch, for its noise.
      prefix: real frames the video starts with (1 + 4 n of them are used).
      schedule: chunk -> prompts from that chunk on.
      seconds: receives, for every generated chunk, the time until its latents and memory, and until its pixels.
      decoded: the codec's state, where a memory goes on that has begun a video.
    """
    model = self.config.model
    f, key, dit = model.chunk_frames, jax.random.key(seed), self.parts.dit
    chunk, made = int(memory.chunk[0]), 0
    first = chunk
    shape = (len(samples), f, *model.latent_size, model.latent_channels)
    given = np.zeros((len(samples), 0, *shape[2:]), np.float32)
    if prefix is not None:
      usable = 1 + 4 * ((prefix.shape[1] - 1) // 4)
      given = np.asarray(self.parts.encode(prefix[:, :usable]))
    decoded = self.parts.start(len(samples)) if decoded is None else decoded
    while made < frames:
      if schedule and chunk in schedule:
        memory = self.set_prompt(memory, schedule[chunk])
      began = time.perf_counter()
      part = given[:, (chunk - first) * f : (chunk - first + 1) * f]
      if part.shape[1] == f:
        latents = jnp.asarray(part)
        memory = self.programs.append(dit, memory, latents)
      else:
        known = np.zeros(shape, np.float32)
        known[:, : part.shape[1]] = part
        latents, memory = self.programs.chunk(
          dit, memory, key, jnp.asarray(samples, jnp.int32), known, jnp.arange(f) < part.shape[1]
        )
      jax.block_until_ready((latents, memory))
      denoised = time.perf_counter() - began
      decoded, pixels = self.parts.decode(decoded, latents, chunk == 0)
      pixels = np.asarray(pixels)
      if seconds is not None and part.shape[1] < f:
        seconds.append((denoised, time.perf_counter() - began))
      pixels = pixels[:, : frames - made]
      made += pixels.shape[1]
      chunk += 1
      yield pixels, memory, decoded


def sample(
  prompt: str = "a red 3 and a blue 7", seconds: float = 5.0, seed: int = 0, checkpoint_dir=SHIPPED, **options
):
  """A video in a notebook: uint8 [F,h,w,3]. options: attention, steps, guidance, see `Sampler`."""
  sampler = Sampler(checkpoint_dir, **options)
  stream = sampler.stream(sampler.start([prompt], seed), round(seconds * sampler.fps), seed, [0])
  return np.concatenate([frames[0] for frames, *_ in stream])
