"""Shards of arrays with captions, in one folder: written one by one, by as many processes as one likes, read by index.

A card beside them says what they are and what the clips are told. A rerun makes the shards that are missing, and no others.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors.numpy import load, save

from sfjax.errors import UserError
from sfjax.runlog import make_folder, replacing, write_json_atomic

PART = "every N-th shard from the I-th on: a process a GPU"


def _shard(kind: str, index: int) -> str:
  return f"{kind}-{index:05d}.array_record"


class Records:
  """What a folder holds: {name: array, ..., "caption": str} by index.

  Attributes:
    card: what was told of them when they were written. captions: all of them, in order.
  """

  def __init__(self, path: str, kind: str, writer: str):
    """kind: of shards. writer: the module that makes them. Raises UserError: no such folder, or shards that are missing."""
    folder = pathlib.Path(path)
    try:
      self.card = json.loads((folder / f"{kind}.json").read_text())
    except (OSError, ValueError) as e:
      raise UserError(f"config.data.path: {path!r} is no folder that {writer} wrote: {kind}.json cannot be read") from e
    if "captions" not in self.card:
      raise UserError(
        f"config.data.path: {path} was written by an earlier {writer}; its command into a new folder makes it anew"
      )
    self.captions = self.card["captions"]
    files = [folder / _shard(kind, i) for i in range(self.card["shards"])]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
      raise UserError(
        f"config.data.path: {path} lacks {len(missing)} of {len(files)} shards, first {missing[0]}; the same {writer} "
        "command makes them"
      )
    self._records = grain.sources.ArrayRecordDataSource([str(f) for f in files])

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    found = load(self._records[index])
    return found | {"caption": found["caption"].tobytes().decode()}


def part(text: str) -> tuple[int, int]:
  """--part I/N as (I, N). Raises UserError: not of this form."""
  found = re.fullmatch(r"(\d+)/(\d+)", text)
  first, parts = map(int, found.groups()) if found else (0, 0)
  if first >= parts:
    raise UserError(f"--part: {text!r}; want I/N, I from 0 to N - 1")
  return first, parts


def shards(clips: int, batch: int, part: tuple[int, int]) -> list[range]:
  """The clips of each shard of a part."""
  return [range(i, min(i + batch, clips)) for i in range(0, clips, batch)][part[0] :: part[1]]


def write(
  path: str, kind: str, card: dict, captions: list[str], batch: int, part: tuple[int, int], make: Callable
) -> None:
  """Writes a folder's shards of `batch` clips, or those of a part, as far as they are not there.

  Args:
    make: indices of clips -> {name: array, a row a clip}.

  Raises:
    UserError: a folder that cannot be written, or that holds others.
  """
  from tqdm import tqdm

  out, count = make_folder(path, "--out"), -(-len(captions) // batch)
  card = card | {"shards": count, "captions": captions}
  file = out / f"{kind}.json"
  if not file.is_file():
    own = out / f".{file.name}.{part[0]}"  # other parts begin at the same time
    write_json_atomic(own, card)
    os.replace(own, file)
  if json.loads(file.read_text()) != card:
    raise UserError(f"--out: {out} holds {kind} of other flags, see {file.name}")
  for indices in tqdm(shards(len(captions), batch, part), unit="shard", disable=None):
    name = out / _shard(kind, indices[0] // batch)
    if name.is_file():
      continue
    arrays = make(np.asarray(indices))
    with replacing(name) as target:
      writer = ArrayRecordWriter(str(target), "group_size:1")
      for row, index in enumerate(indices):
        caption = np.frombuffer(captions[index].encode(), np.uint8)
        writer.write(save({name: x[row] for name, x in arrays.items()} | {"caption": caption}))
      writer.close()
  told = f", of which part {part[0]}/{part[1]} is made" if part[1] > 1 else ""
  print(f"{out}: {len(captions)} clips in {count} shards{told}")
