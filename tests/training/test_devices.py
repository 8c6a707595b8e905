"""A run's losses and weights do not depend on how many devices and hosts it is spread over."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import cluster, teacher_forcing, training
from sfjax.checkpoint import load_arrays
from sfjax.config import Config, load_config, to_dataclass
from sfjax.errors import UserError
from tests.training.test_self_forcing import make, ready, teacher  # noqa: F401, a fixture

STEPS = 3
CHANGES = dict(steps=STEPS, log_every=1, save_every=2, warmup=1, threads=1, lr=1e-3)
SCRIPT = """
import dataclasses, sys
import jax
from sfjax import cluster, self_forcing, training
from sfjax.config import Config, Stage, load_config, to_dataclass

workdir, changes, address, process = sys.argv[1], eval(sys.argv[2]), sys.argv[3], int(sys.argv[4])
cluster.join(address, 2, process)
assert (jax.device_count(), jax.local_device_count()) == (8, 4)
config = to_dataclass(Config, load_config("configs/digits.py:tiny"))
stages = (Stage(1.0, chunks=1, batch=8, dense=True),)
train = dataclasses.replace(config.train, stages=stages, **changes)
training.train(dataclasses.replace(config, train=train), workdir)
"""


def step_of_self_forcing(folder, fsdp=1):
  """Metrics of a step over all devices, and norms of the student's and the critic's weights after it."""
  config = make(folder)
  step, *given = ready(dataclasses.replace(config, train=dataclasses.replace(config.train, fsdp=fsdp)))
  state, metrics = step(*given)
  norms = {part: jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(state[part]))) for part in ("params", "critic")}
  return {name: float(x) for name, x in (metrics | norms).items()}


def two_hosts(workdir, **changes):
  """Starts training on 2 processes of 4 devices each."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  env = os.environ | dict(JAX_NUM_CPU_DEVICES="4", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  line = [
    sys.executable,
    "-W",
    "error::DeprecationWarning",
    "-c",
    SCRIPT,
    str(workdir),
    repr(CHANGES | changes),
    address,
  ]
  return [
    subprocess.Popen([*line, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for i in range(2)
  ]


def on_two_hosts(workdir, **changes):
  """Trains on them to the end."""
  for run in two_hosts(workdir, **changes):
    said = run.communicate(timeout=600)[0]
    assert run.returncode == 0, said[-2000:]


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_hosts_of_four_devices_train_as_one_device_does(tmp_path):
  """Two steps of 4 x 2 devices, then restored onto one for the third, against 1 x 1 from the beginning."""
  config = to_dataclass(Config, load_config("configs/digits.py:tiny"))
  stage = dataclasses.replace(config.train.stages[0], until=1.0, chunks=1, batch=8)
  train = dataclasses.replace(config.train, stages=(stage,), **CHANGES)
  config = dataclasses.replace(config, train=train)
  one = training.train(config, tmp_path / "one")
  on_two_hosts(tmp_path / "many", steps=2, fsdp=2)
  training.train(config, tmp_path / "many")
  for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "many"), strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)  # sums of the same numbers in another order
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
  many = load_arrays(tmp_path / "many" / "model" / "params.npz")
  for name, x in load_arrays(one / "params.npz").items():
    # Exported in bfloat16; Adam divides by a gradient's size, so one that is all rounding may move by the rate.
    np.testing.assert_allclose(x.astype(np.float32), many[name].astype(np.float32), rtol=2**-7, atol=1e-3, err_msg=name)


def test_two_devices_distil_as_one_does(teacher):  # noqa: F811
  code = "import json, sys; from tests.training.test_devices import step_of_self_forcing as f; "
  code += "print(json.dumps(f(sys.argv[1], int(sys.argv[2]))))"
  env = os.environ | dict(JAX_NUM_CPU_DEVICES="2", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  env["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # two devices may share a busy core
  said = subprocess.run([sys.executable, "-c", code, teacher, "2"], env=env, capture_output=True, text=True)
  assert said.returncode == 0, said.stderr[-2000:]
  want = step_of_self_forcing(teacher)
  got = json.loads(said.stdout.splitlines()[-1])
  assert got.keys() == want.keys()
  np.testing.assert_allclose([*got.values()], [*want.values()], rtol=1e-5)


def test_the_death_of_a_host_ends_the_others(tmp_path):
  survivor, victim = two_hosts(tmp_path, steps=10**6)
  while not (tmp_path / "checkpoints" / "2").is_dir():
    assert survivor.poll() is None is victim.poll()
    time.sleep(0.2)
  victim.kill()
  said = survivor.communicate(timeout=90)[0]  # 30 s of silence, and what a slow machine takes beside
  victim.communicate()
  assert survivor.returncode != 0
  assert re.search("another (task died|host has died)", said), said[
    -2000:
  ]  # the service's words, or a failed program's
  on_two_hosts(tmp_path, steps=max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) + 2)


def test_a_program_that_fails_among_hosts_is_told_as_a_death(monkeypatch):
  def fail():
    with cluster.explained():
      raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: connection closed\nmore")

  with pytest.raises(jax.errors.JaxRuntimeError):  # on one host it is what it says
    fail()
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match="another host has died, or this one failed .*connection closed.; rerun on all"):
    fail()


def test_what_is_split_and_what_is_whole():
  mesh = jax.sharding.AbstractMesh((4, 2), cluster.AXES)
  tree = {"matrix": np.zeros((3, 8, 4)), "odd": np.zeros((3, 5)), "vector": np.zeros(8)}
  found = {name: tuple(s.spec) for name, s in cluster.shardings(mesh, tree).items()}
  assert found == {"matrix": (None, "fsdp", None), "odd": (None, None), "vector": (None,)}


def test_a_step_that_does_not_fit_is_refused(monkeypatch):
  program = jax.jit(lambda x: jnp.sort(x @ x.T, 0)[::2].sum()).lower(jnp.zeros((1000, 10))).compile()
  needs = cluster.step_bytes(program)  # a CPU tells no limit
  assert needs["held"] >= 40_000 and needs["workspace"] >= 4_000_000
  device = type("Device", (), {"memory_stats": lambda self: {"bytes_limit": 1_000_000}})
  monkeypatch.setattr(jax, "local_devices", lambda: [device()])
  with pytest.raises(
    UserError, match="config.train: a step takes 0.0 GB on each device, which has 0.0; want a smaller"
  ):
    cluster.step_bytes(program)


def test_what_does_not_divide_or_is_half_told():
  with pytest.raises(UserError, match="config.train.fsdp: 3 does not divide 1 devices"):
    cluster.make_mesh(3)
  with pytest.raises(UserError, match="--coordinator None --processes 2 --process 0; want all three or none"):
    cluster.join(None, 2, 0)
  with pytest.raises(UserError, match="a process of 0 .. processes - 1"):
    cluster.join("here:1", 2, 2)


@pytest.mark.parametrize("variant", ["tiny", "", "teacher", "window"])
def test_fresh_weights_made_one_by_one_have_the_same_bits(variant):
  config = to_dataclass(Config, load_config(f"configs/digits.py:{variant}"))
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, init="", seed=3))
  whole, apart = teacher_forcing.init_model(config), teacher_forcing.init_model(config, cluster.make_mesh())
  jax.tree.map(np.testing.assert_array_equal, whole, apart)
  assert jax.tree.map(lambda x: x.dtype, whole) == jax.tree.map(lambda x: x.dtype, apart)


def test_no_device_holds_all_fresh_weights(monkeypatch):
  """What is placed leaves the device here; then there is only what was just made, not even its inputs."""
  config = to_dataclass(Config, load_config("configs/digits.py:base"))
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(teacher_forcing.abstract_model(config))]
  held = lambda: sum(x.nbytes for x in jax.live_arrays())
  before, seen = held(), []
  monkeypatch.setattr(cluster, "placed", lambda x, _: seen.append(held() - before) or np.array(x))
  teacher_forcing.init_model(config, cluster.make_mesh())
  assert len(seen) == len(sizes) and max(seen) < 2 * max(sizes) < sum(sizes) / 2
