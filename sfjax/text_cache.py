"""Text embeddings on disk, by prompt: an encoder of 11 GB need not be loaded for a prompt that was seen before."""

import dataclasses
import hashlib
import io
import os
import pathlib
import uuid
import zlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sfjax.runlog import make_folder, replacing
from sfjax.umt5 import clean_prompt


@dataclasses.dataclass(frozen=True)
class TextCache:
  """A folder of .npy files, one a prompt, without the zero rows past its end; processes may share it.

  bfloat16 is stored as its bits. Four bytes after the array (which `np.load` ignores) are the checksum of what is before.

  Attributes:
    identity: all that an embedding depends on besides its prompt, see `UMT5Encoder.identity`.
    shape: [M, E] of an embedding. dtype: "bfloat16" or "float32".
  """

  folder: str | os.PathLike
  identity: str
  shape: tuple[int, int] = (512, 4096)
  dtype: str = "bfloat16"

  def path(self, prompt: str, flag: str = "--prompt") -> pathlib.Path:
    """Where a prompt's embedding is or would be. Prompts that are equal once cleaned share a file."""
    name = hashlib.sha256(f"{self.identity}\0{clean_prompt(prompt, flag)}".encode()).hexdigest()
    return pathlib.Path(self.folder) / f"{name}.npy"

  def embed(
    self, prompts: list[str], encode: Callable[[list[str]], np.ndarray], batch: int = 1, flag: str = "--prompt"
  ) -> Float[np.ndarray, "B M E"]:
    """Embeddings of the prompts; what no readable file holds is encoded and stored, batch by batch.

    Args:
      encode: prompts (as given, not cleaned) -> [b, M, E] in `dtype`; called with at most `batch` of them, maybe never.

    Raises:
      UserError: a prompt is not valid text; the folder cannot be written, or the disk is full.
    """
    paths = [self.path(prompt, flag) for prompt in prompts]
    found = {path: self._read(path) for path in paths}
    missing: dict[pathlib.Path, str] = {}
    for path, prompt in zip(paths, prompts, strict=True):
      if found[path] is None:
        missing.setdefault(path, prompt)
    if missing:
      make_folder(self.folder, "the text cache")
    todo = list(missing)
    for start in range(0, len(todo), batch):
      some = todo[start : start + batch]
      rows = np.asarray(encode([missing[path] for path in some]))
      if rows.shape != (len(some), *self.shape) or rows.dtype != jnp.dtype(self.dtype):
        want = f"{self.dtype} {[len(some), *self.shape]}"
        raise ValueError(f"encode: gave {rows.dtype} {list(rows.shape)}; this cache holds {want}")
      for path, x in zip(some, rows, strict=True):
        self._write(path, x)
        found[path] = x
    return np.stack([found[path] for path in paths]) if paths else np.zeros((0, *self.shape), jnp.dtype(self.dtype))

  def _read(self, path: pathlib.Path) -> np.ndarray | None:
    """An embedding; None where there is no file, or one that is damaged or of another shape."""
    try:
      raw = path.read_bytes()
      if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
      stored = np.load(io.BytesIO(raw[:-4]))
    except (OSError, ValueError, EOFError):
      return None
    length, width = self.shape
    kind = np.uint16 if self.dtype == "bfloat16" else np.float32
    if stored.ndim != 2 or stored.dtype != kind or len(stored) > length or stored.shape[1] != width:
      return None
    rows = np.zeros(self.shape, jnp.dtype(self.dtype))
    rows[: len(stored)] = stored.view(rows.dtype)
    return rows

  def _write(self, path: pathlib.Path, rows: np.ndarray) -> None:
    used = np.flatnonzero((rows != 0).any(1))
    rows = np.ascontiguousarray(rows[: used[-1] + 1 if len(used) else 0])
    buffer = io.BytesIO()
    np.save(buffer, rows.view(np.uint16) if self.dtype == "bfloat16" else rows)
    raw = buffer.getvalue()
    own = path.with_name(f".{path.stem}.{uuid.uuid4().hex}")  # two processes may make the same file
    with replacing(own) as part:
      part.write_bytes(raw + zlib.crc32(raw).to_bytes(4, "little"))
    own.replace(path)
