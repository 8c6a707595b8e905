"""The loader: an endless stream of batches that depends on (seed, step) alone and can begin at any step.

Grain does the work: a seeded shuffle anew for every epoch, a slice for every host, threads that prepare batches ahead.
"""

import pathlib
from typing import Protocol

import grain
import numpy as np
from absl import flags

from sfjax.data.digits import DigitsConfig, render, render_mixed
from sfjax.errors import UserError


class Source(Protocol):
  """Anything with a length and random access to {"frames": uint8 [F, h, w, 3], "caption": str}."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict: ...


class DigitsSource:
  """Generated digits with random access, 2^31 - 1 clips long; "prefix" beside frames and caption is `Clip.prefix_chunks`.

  Args:
    prompt: config of the clips.
    memory: config of a share p_memory of them, if any.
    seed: which stream of clips; the loader's seed only orders it.

  Raises:
    ValueError: as `render_mixed`, or p_memory without a memory config.
  """

  def __init__(self, prompt: DigitsConfig, memory: DigitsConfig | None = None, p_memory: float = 0.0, seed: int = 0):
    if memory is None and p_memory:
      raise ValueError(f"p_memory: {p_memory} is not accepted; 0 where memory is None")
    self._configs, self._p_memory, self._seed = (prompt, memory), p_memory, seed
    self[0]  # fails now, not in a thread, where the configs do not fit

  def __len__(self) -> int:
    return 2**31 - 1

  def __getitem__(self, index: int) -> dict:
    prompt, memory = self._configs
    if memory is None:
      clip = render(prompt, self._seed, index)
    else:
      clip = render_mixed(prompt, memory, self._p_memory, self._seed, index)
    return {"frames": clip.frames, "caption": clip.caption, "prefix": np.int32(clip.prefix_chunks)}


class Prompts:
  """The captions of a source's clips: {"caption": str}."""

  def __init__(self, source: Source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict:
    return {"caption": self._source[index]["caption"]}


class Beginnings:
  """The captions of a source of digits, how many chunks ("prefix") clips show before they hide, and the first frames of all."""

  def __init__(self, source: DigitsSource, frames: int):
    self._source, self._frames = source, frames

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict:
    clip = self._source[index]
    return clip | {"frames": clip["frames"][: self._frames]}


class PromptFile:
  """The lines of a text file: {"caption": str}; empty lines are none.

  Attributes:
    lines: all of them.

  Raises:
    UserError: the file cannot be read, or has no line; names `flag`.
  """

  def __init__(self, path: str, flag: str):
    if not path:
      raise UserError(f"{flag}: ''; want a text file, one prompt a line")
    try:
      text = pathlib.Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
      why = e.strerror if isinstance(e, OSError) else "not UTF-8"
      raise UserError(f"{flag}: {path} cannot be read ({why})") from e
    self.lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not self.lines:
      raise UserError(f"{flag}: {path} holds no prompt; want one a line")

  def __len__(self) -> int:
    return len(self.lines)

  def __getitem__(self, index: int) -> dict:
    return {"caption": self.lines[index]}


def _stack(examples) -> dict:
  """Arrays on a leading axis, strings in a list."""
  columns = {key: [e[key] for e in examples] for key in examples[0]}
  return {key: x if isinstance(x[0], str) else np.stack(x) for key, x in columns.items()}


def make_loader(
  source: Source,
  batch_size: int,
  seed: int,
  *,
  start: int = 0,
  threads: int = 4,
  workers: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Endless batches {"frames": uint8 [B, F, h, w, 3], "caption": list of B strings}, or of what else a source has.

  Args:
    source: clips; a finite one is shuffled anew in every epoch.
    batch_size: clips of a batch of this process.
    seed: order of the clips.
    start: batches of the stream that are left out.
    threads: batches prepared at once; as many wait ready. NumPy and video decoding free the interpreter.
    workers: processes that prepare batches, each with its own threads; 0 for threads alone.
    process_index, process_count: this host takes every process_count-th clip, from process_index on.

  Returns:
    An iterator.

  Raises:
    ValueError: an argument out of range.
  """
  for name, value in (("batch_size", batch_size), ("threads", threads)):
    if value < 1:
      raise ValueError(f"{name}: {value} is not accepted; at least 1")
  for name, value in (("workers", workers), ("start", start)):
    if value < 0:
      raise ValueError(f"{name}: {value} is not accepted; 0 or more")
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index: {process_index} is not accepted; 0..{process_count - 1}")
  clips = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
  batches = clips[process_index : 2**62 : process_count].batch(batch_size, batch_fn=_stack)[start:]
  dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
  if workers:
    if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags; their defaults will do
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(workers, per_worker_buffer_size=2))
  return iter(dataset)
