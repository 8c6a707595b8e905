"""Shards of arrays with captions, in one folder: written one by one, by as many processes as one likes, read by index.

A card beside them says what they are and what the clips are told. A rerun makes the shards that are missing, and no others.
"""

import bisect
import itertools
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


def _damaged(flag: str, file: pathlib.Path, command: str) -> UserError:
  return UserError(f"{flag}: {file} is damaged; remove it and run the same {command} again")


def _read_card(flag: str, file: pathlib.Path, command: str) -> dict:
  """A folder's card. Raises UserError: the file holds none."""
  try:
    card = json.loads(file.read_text())
  except ValueError as e:
    raise _damaged(flag, file, command) from e
  if (
    not isinstance(card, dict)
    or not isinstance(card.get("shards"), int)
    or not isinstance(card.get("captions", []), list)
  ):
    raise _damaged(flag, file, command)
  return card


def _clips(file: pathlib.Path) -> int:
  """Of a shard; 0 if it cannot be read."""
  try:
    return len(grain.sources.ArrayRecordDataSource([str(file)]))
  except RuntimeError:
    return 0


class Records:
  """What a folder holds: {name: array, ..., "caption": str} by index.

  Attributes:
    card: what was told of them when they were written. captions: all of them, in order.
  """

  def __init__(self, path: str, kind: str, writer: str):
    """kind: of shards. writer: the module that makes them.

    Raises:
      UserError: no such folder, or files of it that are missing or damaged.
    """
    folder, self._command = pathlib.Path(path), f"{writer} command"
    try:
      self.card = _read_card("config.data.path", folder / f"{kind}.json", self._command)
    except OSError as e:
      raise UserError(f"config.data.path: {path!r} is no folder that {writer} wrote: {kind}.json cannot be read") from e
    if "captions" not in self.card:
      raise UserError(
        f"config.data.path: {path} was written by an earlier {writer}; its command into a new folder makes it anew"
      )
    self.captions = self.card["captions"]
    self._files = files = [folder / _shard(kind, i) for i in range(self.card["shards"])]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
      raise UserError(
        f"config.data.path: {path} lacks {len(missing)} of {len(files)} shards, first {missing[0]}; the same {writer} "
        "command makes them"
      )
    try:
      self._records = grain.sources.ArrayRecordDataSource([str(f) for f in files])
    except RuntimeError as e:
      file = next((f for f in files if not _clips(f)), None)
      if file is None:
        raise
      raise _damaged("config.data.path", file, self._command) from e

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    try:
      found = load(self._records[index])
    except RuntimeError as e:
      ends = list(itertools.accumulate(map(_clips, self._files)))
      raise _damaged("config.data.path", self._files[bisect.bisect(ends, index)], self._command) from e
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
    UserError: a folder that cannot be written, or that holds others or a damaged card.
  """
  from tqdm import tqdm

  out, count = make_folder(path, "--out"), -(-len(captions) // batch)
  card = card | {"shards": count, "captions": captions}
  file = out / f"{kind}.json"
  if not file.is_file():
    own = out / f".{file.name}.{part[0]}"  # other parts begin at the same time
    write_json_atomic(own, card)
    os.replace(own, file)
  if _read_card("--out", file, "command") != card:
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
