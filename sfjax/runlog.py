"""run.json: what ran, where, and how fast, written beside every result."""

import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile

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


def write_json_atomic(path, value) -> None:
  """Writes beside, then renames: readers see the old file or the whole new one."""
  path = pathlib.Path(path)
  part = path.with_name(f".{path.name}.part")
  part.write_text(json.dumps(value, indent=1) + "\n")
  os.replace(part, path)


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
    "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
  }


def _commit() -> str | None:
  folder = pathlib.Path(__file__).parent
  try:
    out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return out.stdout.strip() or None


def run_record(config: dict, **measured) -> dict:
  """Config, versions, device and what was measured."""
  device = jax.devices()[0]
  return {
    "command": sys.argv,
    "config": config,
    "versions": {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "jaxlib": jaxlib.__version__,
      "flax": flax.__version__,
      "commit": _commit(),
    },
    "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
    **measured,
  }
