"""Tuning parameters of the Hopper kernels: what may be chosen, what fits, and what measured best on a device.

`python -m pallas_kernels.pbsa.tune` measures; its winners lie in tuned/, one file a device.
"""

import dataclasses
import functools
import json
import pathlib
import re

from pallas_kernels.pbsa.lists import BLOCK, TILE

TUNED = pathlib.Path(__file__).parent / "tuned"
SHARED_MEMORY = 232448  # bytes a program may use on Hopper
MOST_PIECES = 8
# What a program costs beside its list, a piece's sums included, and joining all pieces, in the time of a block: roughly, on
# H100 and H200 (NOTES.md).
START, JOIN = 12, 10


@dataclasses.dataclass(frozen=True)
class Config:
  """Tuning parameters.

  *_stages: slots in a kernel's ring, in dq at least 3: it waits for the keys of the step after next before it frees this
  step's, and would wait for ever. *_width: key blocks per step where a kernel walks a tile's blocks. dkv_blocks: key
  blocks that one program of the last kernel takes in turn.
  """

  forward_stages: int = 2
  forward_width: int = 2
  dq_stages: int = 4
  dq_width: int = 1
  dkv_stages: int = 2
  dkv_blocks: int = 1

  def __post_init__(self):
    if self.dq_stages < 3:
      raise ValueError(f"dq_stages: {self.dq_stages}; want 3 or more")


KERNELS = {  # what is tried for each
  "forward": {"forward_stages": (2, 3, 4, 6), "forward_width": (1, 2, 4)},
  "dq": {"dq_stages": (3, 4, 6), "dq_width": (1, 2, 4)},
  "dkv": {"dkv_stages": (2, 3, 4), "dkv_blocks": (1, 2, 4)},
}


def whole_and_pieces(tiles: int, blocks: int, multiprocessors: int) -> tuple[int, int]:
  """How many tiles are worked on whole, and into how many pieces the lists of all others are cut.

  A multiprocessor runs one program at a time, so tiles come in rounds, and the last round may be a nearly empty one. Its
  tiles are cut where that makes it shorter; a single round's are not, which was slower on an H100 (NOTES.md).

  Args:
    tiles: query tiles of all heads and batch rows. blocks: the most that a tile reads, as far as it is known.
  """
  last = tiles % multiprocessors if tiles > multiprocessors else 0

  def time(pieces):
    return -(-last * pieces // multiprocessors) * (START + blocks / pieces) + JOIN * (pieces > 1)

  best = min(range(1, MOST_PIECES + 1), key=time)  # of equals the fewest
  return (tiles, 1) if best == 1 else (tiles - last, best)


def loaded(kv_valid: int, width: int) -> int:
  """Slots of a block that are loaded: the valid ones where `width` blocks of that many fill tiles of 64."""
  rows = -(-kv_valid // 8) * 8
  return BLOCK if width * rows % 64 else rows


def shared_memory(config: Config, head_dim: int, kv_valid: int) -> dict[str, int]:
  """Bytes that each kernel's program takes, barriers at 8 each."""
  vector, row = 4 * TILE, 2 * head_dim

  def walk(stages, width):  # a ring for keys and one for values
    return 2 * stages * width * loaded(kv_valid, width) * row + 8 * 4 * stages

  return {
    "forward": TILE * row + vector + walk(config.forward_stages, config.forward_width) + 8 * 2,
    "dq": 2 * TILE * row + 2 * vector + walk(config.dq_stages, config.dq_width) + 8 * 2,
    "dkv": 4 * BLOCK * row
    + 2 * config.dkv_stages * (TILE * row + vector)
    + BLOCK * head_dim * 4
    + 8 * (4 * config.dkv_stages + 5),
  }


def fits(config: Config, head_dim: int, kv_valid: int, kernel: str) -> bool:
  """Whether a kernel can run so: shared memory, and a step of at most 256 columns, what the tensor cores take."""
  width = {"forward": config.forward_width, "dq": config.dq_width, "dkv": 1}[kernel]
  step = width * loaded(kv_valid, width)
  return shared_memory(config, head_dim, kv_valid)[kernel] <= SHARED_MEMORY and step <= 256 and step % 64 == 0


def heuristic(head_dim: int, kv_valid: int) -> Config:
  """Where nothing was measured: what fits any number of valid slots, as it measured best on an H100."""
  if head_dim == 128:
    return Config()
  return Config(forward_width=4 if kv_valid <= 48 else 2, dkv_blocks=2)  # four blocks of 48 fill three tiles of 64


def tuned_file(device_kind: str) -> pathlib.Path:
  """Where a device's winners lie."""
  return TUNED / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()) + ".json")


@functools.cache
def _tuned(device_kind: str) -> dict[tuple[int, int], Config]:
  path = tuned_file(device_kind)
  entries = json.loads(path.read_text())["entries"] if path.exists() else []
  return {(e["head_dim"], e["kv_valid"]): Config(**e["config"]) for e in entries}


def choose_config(head_dim: int, kv_valid: int, device_kind: str = "") -> Config:
  """The parameters measured best on a device, or sane ones."""
  return _tuned(device_kind).get((head_dim, kv_valid)) or heuristic(head_dim, kv_valid)
