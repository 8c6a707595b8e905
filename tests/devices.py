"""Functions of tests, called in a process of several CPU devices: a test's own has one."""

import json
import os
import subprocess
import sys


def on_devices(count: int, module: str, call: str):
  """What a function of a test's module returns there, by way of JSON. call: as "name(arguments)"."""
  code = f"import json; import {module} as m; print(json.dumps(m.{call}))"
  env = os.environ | dict(JAX_NUM_CPU_DEVICES=str(count), JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  env["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # the devices may share a busy core
  said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert said.returncode == 0, said.stderr[-2000:]
  return json.loads(said.stdout.splitlines()[-1])
