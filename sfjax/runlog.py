"""run.json: what ran, where, and how fast, written beside every result."""

import contextlib
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import flax
import jax
import jaxlib
import numpy as np

from sfjax.errors import UserError


def make_folder(path, flag: str) -> pathlib.Path:
  """The output folder, made and proved writable before any work starts.

  Raises:
    UserError: it cannot be made or written.
  """
  path = pathlib.Path(path)
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as e:
    raise UserError(f"{flag}: {path} is not a writable folder ({e.strerror})") from e
  return path


@contextlib.contextmanager
def replacing(path) -> Iterator[pathlib.Path]:
  """A hidden file beside `path` to write to: renamed to `path` at the end, deleted on an exception.

  Raises:
    UserError: the file cannot be written (at once, before any work, where the folder is to blame), or the disk is full.
  """
  path = pathlib.Path(path)
  part = path.with_name(f".{path.name}.part")
  refused = lambda e: UserError(f"{path}: cannot be written ({e.strerror})")
  try:
    if path.is_dir():
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    part.touch()
  except OSError as e:
    raise refused(e) from e
  try:
    yield part
    os.replace(part, path)
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise refused(e) from e
    raise
  finally:
    part.unlink(missing_ok=True)


def write_json_atomic(path, value) -> None:
  """Writes beside, then renames: readers see the old file or the whole new one. Raises UserError if it cannot."""
  with replacing(path) as part:
    part.write_text(json.dumps(value, indent=1) + "\n")


def keep_programs() -> None:
  """Lets JAX keep a GPU's compiled programs from run to run, unless JAX_COMPILATION_CACHE_DIR says where already."""
  if jax.default_backend() == "gpu" and not jax.config.jax_compilation_cache_dir:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / "sfjax" / "programs"))


def latency(seconds: list[float]) -> dict:
  """Percentiles of chunk times in seconds, the first apart (it compiles)."""
  rest = seconds[1:] or seconds
  return {
    "count": len(seconds),
    "first": round(seconds[0], 4),
    "p50": round(float(np.percentile(rest, 50)), 4),
    "p95": round(float(np.percentile(rest, 95)), 4),
  }


def peak_memory() -> dict:
  """Peak bytes of the accelerator (None where it does not tell) and of the process."""
  stats = jax.devices()[0].memory_stats() or {}
  return {
    "device": stats.get("peak_bytes_in_use"),
    "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
  }


def _commit() -> str | None:
  folder = pathlib.Path(__file__).parent.parent
  if not (folder / ".git").exists():  # installed: a repository further up is someone else's
    return None
  try:
    out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return out.stdout.strip() or None


def _version() -> str | None:
  try:
    return importlib.metadata.version("sfjax")
  except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
    return None


def run_record(config: dict, **measured) -> dict:
  """Config, versions, device and what was measured."""
  device = jax.devices()[0]
  return {
    "command": [os.path.relpath(sys.argv[0]), *sys.argv[1:]],
    "config": config,
    "versions": {
      "sfjax": _version(),
      "python": platform.python_version(),
      "jax": jax.__version__,
      "jaxlib": jaxlib.__version__,
      "flax": flax.__version__,
      "commit": _commit(),
    },
    "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
    **measured,
  }
