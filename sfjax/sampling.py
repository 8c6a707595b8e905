"""Sampling: from a model folder and a prompt to frames that stream out chunk by chunk; `sample` is sample.py in a notebook."""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from sfjax import cluster, rollout
from sfjax.config import Config
from sfjax.errors import UserError
from sfjax.memory import KVMemory, memory_bytes
from sfjax.parts import Parts, load_parts, with_decoder_apart, with_linear, with_tiny_decoder
from sfjax.routing import MemoryConfig

SHIPPED = pathlib.Path(__file__).parent.parent / "checkpoints" / "digits_student_memory"
ATTENTION = ("sparse", "window", "dense")
LONGEST = 24 * 3600  # seconds of a video
_DENSE_CHUNKS = 7  # 21 latents, Self-Forcing's cache


def attention_preset(config: Config, name: str) -> MemoryConfig:
  """The model's own memory, a plain window of the same KV bytes, or a dense cache of 21 latents.

  Raises:
    UserError: none of `ATTENTION`.
  """
  if name not in ATTENTION:
    raise UserError(f"--attention: {name!r}; want one of {', '.join(ATTENTION)}")
  own, nb = config.memory, config.model.layout.blocks
  if name == "sparse":
    return own
  chunks = _DENSE_CHUNKS if name == "dense" else own.window + round(own.persistent / nb)
  return own.of_window(chunks)


def usable(frames: int) -> int:
  """How many of so many real frames a video starts with: those that fill whole latents."""
  return 1 + 4 * ((frames - 1) // 4)


class Sampler:
  """A loaded model with its compiled programs.

  Args:
    model: a model folder, or one that `load_parts` has read. attention: "sparse" (the trained memory), "window" or "dense".
    tiny_decoder: a file, see `with_tiny_decoder`. devices: of this machine, to share the tokens of a chunk; a loaded model
      has its own. decode_apart: see `with_decoder_apart`. slots: of the memory, "model" or "float8". linear: see
      `ModelConfig`. overrides: of the config's sampler, as steps=4. None leaves each of these as it is.

  Raises:
    UserError: the folder is absent, damaged or of another config, an argument is not accepted, or see `cluster.tokens_mesh`
      and `cluster.device_beside`.
  """

  def __init__(
    self,
    model=SHIPPED,
    attention="sparse",
    tiny_decoder=None,
    devices=1,
    decode_apart=False,
    slots=None,
    linear=None,
    **overrides,
  ):
    if decode_apart and not isinstance(model, Parts):
      cluster.device_beside(devices)  # before all is loaded
    self.parts = model if isinstance(model, Parts) else load_parts(model, devices)
    if tiny_decoder:
      self.parts = with_tiny_decoder(self.parts, tiny_decoder)
    if linear:
      self.parts = with_linear(self.parts, linear)
    if decode_apart:
      self.parts = with_decoder_apart(self.parts)
    config = self.parts.config
    changes = {name: value for name, value in overrides.items() if value is not None}
    memory = attention_preset(config, attention)
    try:
      sampler = dataclasses.replace(config.sampler, **changes)
      memory = dataclasses.replace(memory, slots=slots or memory.slots)
    except ValueError as e:
      whose = f"steps: {changes.get('steps')}; the model's " if str(e).startswith("last_sigma") else ""
      raise UserError(f"--{whose}{e}") from e
    self.config = dataclasses.replace(config, memory=memory, sampler=sampler)
    self.programs = rollout.Compiled(self.config.model, self.config.memory, sampler, self.parts.mesh)
    self.fps = config.data.fps
    self.size = tuple(n * self.parts.codec.space for n in config.model.latent_size)

  @property
  def chunk_length(self) -> int:
    """Frames of every chunk but the first, whose first latent is a single frame."""
    return self.config.model.chunk_frames * self.parts.codec.time

  def first_frame(self, chunk: int) -> int:
    """The first frame of a chunk."""
    return max(0, chunk * self.chunk_length - self.parts.codec.time + 1)

  def chunk_of_frame(self, frame: int) -> int:
    """The chunk that a frame belongs to."""
    return (frame + self.parts.codec.time - 1) // self.chunk_length

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
    return memory.with_text(self.programs.prompt(self.parts.dit, text, null))

  def stream(
    self,
    memory: KVMemory,
    frames: int,
    seed: int,
    samples: list[int],
    prefix: UInt8[np.ndarray, "B F h w 3"] | None = None,
    schedule: dict[int, list[str]] | None = None,
    decoded: Any = None,
  ) -> "Stream":
    """Frames chunk by chunk; the memory and the codec's state that are passed in are consumed.

    Args:
      frames: how many to make; the last chunk is trimmed.
      samples: index of every video of the batch, for its noise.
      prefix: real frames the video starts with (1 + 4 n of them are used).
      schedule: chunk -> prompts from that chunk on.
      decoded: the codec's state, where a memory goes on that has begun a video.
    """
    given = np.zeros((len(samples), 0, *self.config.model.latent_size, self.config.model.latent_channels), np.float32)
    if prefix is not None:
      given = np.asarray(self.parts.encode(prefix[:, : usable(prefix.shape[1])]))
    decoded = self.parts.start(len(samples)) if decoded is None else decoded
    return Stream(self, memory, decoded, frames, jax.random.key(seed), samples, given, schedule or {})


class Stream:
  """An iterator over uint8 frames [B,F,h,w,3], one chunk's at a time; while the caller has them, the device makes the next.

  Attributes:
    memory, decoded: the memory and the codec's state; whole once all frames were taken.
    seconds: for every generated chunk, the time until its latents were there, and until its pixels were on the host, each
      since the chunk was begun or since the chunk before had got as far, whichever is later; latents begin when the pixels of
      the chunk before are there where one device makes both, else when its latents are. At most two chunks are on their way,
      so where a device of its own decodes and is the slower one, both tell its time.
  """

  def __init__(self, sampler: Sampler, memory, decoded, frames, key, samples, given, schedule):
    self.memory, self.decoded, self.seconds = memory, decoded, []
    self._sampler, self._key, self._samples = sampler, key, jnp.asarray(samples, jnp.int32)
    self._given, self._schedule, self._asked, self._firsts = given, schedule, None, set()
    self._frames = self._run(frames)

  def __iter__(self) -> Iterator[UInt8[np.ndarray, "B F h w 3"]]:
    return self

  def __next__(self) -> UInt8[np.ndarray, "B F h w 3"]:
    return next(self._frames)

  def _run(self, frames: int):
    first, made, last = int(self.memory.chunk[0]), 0, (0.0, 0.0)
    # Starting a chunk's work lasts nearly as long as the work, since a GPU's queue holds some thousand kernels.
    with ThreadPoolExecutor(1) as starter:
      begin_next = lambda: starter.submit(self._begin, first + made, made)
      work = begin_next()
      while frames > 0:
        began, latents, pixels, generated = work.result()
        made, mine, frames = made + 1, min(frames, pixels.shape[1]), frames - pixels.shape[1]
        if made > 1 and frames > 0:
          work = begin_next()
        latents.block_until_ready()
        denoised = time.perf_counter()
        pixels.block_until_ready()
        decoded = time.perf_counter()
        pixels = np.asarray(pixels)[:, :mine]
        there = time.perf_counter()
        if generated:
          self.seconds.append((denoised - max(began, last[0]), there - max(began, last[1])))
        last = (denoised if self._sampler.parts.decoder else decoded), there
        if made == 1 and frames > 0:  # the first frames do not wait until the second chunk is started, or even compiled
          work = begin_next()
        yield pixels

  def workspace(self) -> dict[str, int]:
    """Bytes that the stream's programs need beside what they are given and what they return, as XLA tells.

    To be asked once all frames were taken; empty where no chunk was generated.
    """
    if not self._asked:
      return {}
    sampler, f = self._sampler, self._sampler.config.model.chunk_frames
    memory, state, latents = self._asked
    known, is_known = jax.ShapeDtypeStruct(latents.shape, latents.dtype), jax.ShapeDtypeStruct((f,), bool)
    programs = {
      "chunk": sampler.programs.chunk.lower(sampler.parts.dit, memory, self._key, self._samples, known, is_known),
    } | {
      "decode first" if first else "decode": sampler.parts.decode.lower(state, latents, first) for first in self._firsts
    }  # all have run on the very same shapes, so that nothing is compiled here
    return {name: program.compile().memory_analysis().temp_size_in_bytes for name, program in programs.items()}

  def _begin(self, chunk: int, made: int):
    """Starts a chunk's work on the device: (time, latents, pixels, whether it is not a given chunk)."""
    began = time.perf_counter()
    sampler, f = self._sampler, self._sampler.config.model.chunk_frames
    dit, programs = sampler.parts.dit, sampler.programs
    if chunk in self._schedule:
      self.memory = sampler.set_prompt(self.memory, self._schedule[chunk])
    part = self._given[:, made * f : (made + 1) * f]
    generated, before = part.shape[1] < f, jax.tree.map(_like, (self.memory, self.decoded))
    if generated:
      known = np.zeros((part.shape[0], f, *part.shape[2:]), np.float32)
      known[:, : part.shape[1]] = part
      is_known = jnp.arange(f) < part.shape[1]
      latents, self.memory = programs.chunk(dit, self.memory, self._key, self._samples, known, is_known)
      if programs.mesh:
        latents = latents.addressable_data(0)  # all have them
    else:
      latents = jnp.asarray(part)
      self.memory = programs.append(dit, self.memory, latents)
    latents = jax.device_put(latents, sampler.parts.decoder)
    if generated:
      self._asked = (*before, _like(latents))
      self._firsts.add(chunk == 0)
    self.decoded, pixels = sampler.parts.decode(self.decoded, latents, chunk == 0)
    return began, latents, pixels, generated


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
  """What compiles as the array does."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)


def sample(
  prompt: str = "a red 3 and a blue 7", seconds: float = 5.0, seed: int = 0, checkpoint_dir=SHIPPED, **options
):
  """A video in a notebook: uint8 [F,h,w,3]. options: attention, steps, ..., see `Sampler`."""
  if not 0 < seconds <= LONGEST:
    raise UserError(f"seconds: {seconds:g}; want more than 0 and at most {LONGEST}")
  sampler = Sampler(checkpoint_dir, **options)
  frames = max(1, round(seconds * sampler.fps))
  stream = sampler.stream(sampler.start([prompt], seed), frames, seed, [0])
  return np.concatenate([frames[0] for frames in stream])
