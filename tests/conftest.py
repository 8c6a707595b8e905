"""Most of a test's time is compiling: what one process of a run has compiled, its workers and subprocesses find."""

import os
import tempfile

CACHE = "JAX_COMPILATION_CACHE_DIR"  # a worker has it from the process that started it
programs = None

if CACHE not in os.environ:  # here, not in a hook: the folders' own conftest.py import jax, which reads it
  programs = tempfile.TemporaryDirectory(prefix="sfjax-programs-")
  os.environ |= {CACHE: programs.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def pytest_unconfigure():
  if programs:
    programs.cleanup()
