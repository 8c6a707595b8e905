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
from jax.sharding import AbstractMesh, PartitionSpec

from sfjax import axes, captions, cluster, float8, rollout, routing, self_forcing, teacher_forcing, training
from sfjax.axes import AXES
from sfjax.checkpoint import load_arrays, named
from sfjax.config import Config, Stage, load_config, to_dataclass
from sfjax.data.digits import frames_of_chunks
from sfjax.errors import UserError
from sfjax.flow import SamplerConfig
from sfjax.routing import MemoryConfig
from tests.memory.test_equality import random_params, tiny
from tests.training.test_self_forcing import MODEL, STAGE, begin, make, on_mesh, teacher  # noqa: F401, a fixture

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
model = dataclasses.replace(config.model, heads=2)
training.train(dataclasses.replace(config, model=model, train=train), workdir)
"""


def step_on(config, stage, state, fixed, batches, devices, **along):
  """Metrics of a step on so many devices, and the norm of every array of the state after it."""
  mesh = cluster.make_mesh(**along, devices=jax.devices()[:devices])
  step, *given = on_mesh(mesh, config, stage, state, fixed, batches)
  state, metrics = step(*given)
  return {name: float(jnp.linalg.norm(x.astype(jnp.float32))) for name, x in named([metrics, state]).items()}


def distilled(folder):
  """A step of self-forcing on one device and on eight: two of clips, times two of weights, times two of heads."""
  config, told = make(folder), ["a red 3", "a blue 7 and a green 1", "a green 2", ""]
  batches = [(self_forcing.inputs(config, {"caption": told}), cluster.places(len(told)))]
  what = config, STAGE, begin(config), self_forcing.fixed(config), batches
  return step_on(*what, 1), step_on(*what, 8, fsdp=2, tensor=2)


def learned(window, **along):
  """A step of teacher forcing, clips of 4 chunks and beside them single ones, on one device and on eight.

  Args:
    window: chunks of a plain window; 0 for a memory with P and lists.
  """
  config, stage = make(""), Stage(1.0, chunks=4, batch=4, firsts=4)
  if window:
    config = dataclasses.replace(config, memory=MemoryConfig(window=window))
  params = {"dit": random_params(MODEL, 6), "text": teacher_forcing.init_model(config)["text"]}
  draw = lambda n: np.random.default_rng(n).integers(0, 256, (4, frames_of_chunks(n), 8, 12, 3), np.uint8)
  told = captions.text(config, ["a red 3", "a blue 7", "a green 2", ""])
  batches = [((draw(n), told), cluster.places(4)) for n in (4, 1)]
  what = config, stage, teacher_forcing.state_of(config, params), (), batches
  return step_on(*what, 1), step_on(*what, 8, **along)


def routed():
  """Norms of what rules over all heads decide, on one device and on four of two heads each."""
  mesh, layout, rng = cluster.make_mesh(tensor=4, devices=jax.devices()[:4]), MODEL.layout, np.random.default_rng(0)
  r = 3 + 2 * layout.blocks
  score, content = rng.random((2, 8, r), np.float32), rng.normal(size=(2, r, 8, 4)).astype(np.float32)
  origin = np.broadcast_to(np.arange(r, dtype=np.int32), (2, 8, r))
  valid, chunk, key = np.ones((2, 8, r), bool), jnp.int32(3), jax.random.split(jax.random.key(1), 2)
  found = {}
  for name, cfg in (
    ("layer", MemoryConfig(window=2, persistent=3, sharing="layer", novelty=4.0)),
    ("random", MemoryConfig(window=2, persistent=3, importance="random")),
  ):

    def decide(score, content, valid, cfg=cfg):
      best = routing.eviction_scores(cfg, layout, score, origin[:, : score.shape[1]], content)
      kept = routing.select_persistent(cfg, layout, best, origin[:, : score.shape[1], : best.shape[-1]])
      new = routing.importance(cfg, layout, None, content, content[:, :4], content, valid, score, chunk, key)
      return best, kept, new

    heads = PartitionSpec(None, "tensor")
    apart = axes.on_devices(decide, mesh, (heads, PartitionSpec(None, None, "tensor"), heads), heads)
    found[name] = [f(score, content, valid) for f in (jax.jit(decide), jax.jit(apart))]
  weighed = lambda x: float((np.asarray(x, np.float64) * (1 + np.arange(x.size).reshape(x.shape))).sum())
  return [{f"{name} {i}": weighed(x) for name, of in found.items() for i, x in enumerate(of[j])} for j in range(2)]


def sampled(batch=1, linear="dtype", **memory):
  """How far four chunks of four devices and the memory after them are from one device's: relative L2 of every array.

  A chunk's 108 tokens are 5 groups of 24 rows: of four devices the last has none. The first latent of each chunk is known.
  """
  model = tiny(latent_size=(12, 12), tile=(3, 2, 2), block_tokens=16, heads=4, importance_head=True)
  cfg = MemoryConfig(**dict(window=2, persistent=5, top_k=0.5, rope_cap=4) | memory)
  sampler = SamplerConfig(steps=2, shift=5.0, guidance=3.0)
  params, draw = random_params(model, 3), lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  frames = draw(1, batch, 3, *model.latent_size, model.latent_channels)
  if linear == "float8":
    rounded = dataclasses.replace(model, linear=linear)
    model, params = rounded, float8.quantised(params, rollout.abstract_params(rounded))
  given = jax.random.key(2), jnp.arange(batch), frames, jnp.arange(3) < 1

  def made(devices):
    programs = rollout.Compiled(model, cfg, sampler, cluster.tokens_mesh(devices, model))
    text = draw(3, batch, model.text_len, model.text_dim)
    memory, chunks = programs.start(params, text, 0, 0 * text[:1]), []
    memory = programs.append(params, memory, frames)
    for _ in range(4):
      x, memory = programs.chunk(params, memory, *given)
      memory, chunks = memory.with_text(programs.prompt(params, -text, text[:1])), [*chunks, np.asarray(x)]
    return {name: np.asarray(x).astype(np.float64) for name, x in named([chunks, vars(memory)]).items()}

  one, many = made(1), made(4)
  assert many.keys() == one.keys()
  return {name: float(np.linalg.norm(many[name] - x) / np.linalg.norm(x)) for name, x in one.items()}


def on_eight_devices(call: str):
  """What a function of this module returns, called in a process of 8 devices."""
  code = f"import json; from tests.training import test_devices; print(json.dumps(test_devices.{call}))"
  env = os.environ | dict(JAX_NUM_CPU_DEVICES="8", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  env["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600"  # eight devices may share a busy core
  said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert said.returncode == 0, said.stderr[-2000:]
  return json.loads(said.stdout.splitlines()[-1])


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
  """Two steps of 2 x 2 x 2 devices, then restored onto one for the third, against 1 x 1 x 1 from the beginning."""
  config = to_dataclass(Config, load_config("configs/digits.py:tiny"))
  stage = dataclasses.replace(config.train.stages[0], until=1.0, chunks=1, batch=8)
  train = dataclasses.replace(config.train, stages=(stage,), **CHANGES)
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, heads=2), train=train)
  one = training.train(config, tmp_path / "one")
  on_two_hosts(tmp_path / "many", steps=2, fsdp=2, tensor=2)
  training.train(config, tmp_path / "many")
  for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "many"), strict=True):
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)  # sums of the same numbers in another order
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
  many = load_arrays(tmp_path / "many" / "model" / "params.npz")
  for name, x in load_arrays(one / "params.npz").items():
    # Exported in bfloat16; Adam divides by a gradient's size, so one that is all rounding may move by the rate.
    np.testing.assert_allclose(x.astype(np.float32), many[name].astype(np.float32), rtol=2**-7, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
  ("call", "least"),
  [
    ("routed()", 6),
    ("learned(0, fsdp=2, context=2, tensor=2)", 150),
    ("learned(2, context=4)", 150),
    ("distilled({teacher!r})", 250),
  ],
)
def test_eight_devices_train_as_one_does(call, least, request):
  folder = str(request.getfixturevalue("teacher")) if "teacher" in call else ""
  want, got = on_eight_devices(call.format(teacher=folder))
  assert got.keys() == want.keys() and len(want) >= least
  for name, x in want.items():  # sums of the same numbers in another order
    np.testing.assert_allclose(got[name], x, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
  "memory",
  [
    "importance='learned', sharing='layer', novelty=4.0, batch=2",
    "importance='random'",
    "slots='float8', linear='float8'",
  ],
)
def test_devices_sample_as_one_does(memory):
  found = on_eight_devices(f"sampled({memory})")
  assert len(found) >= 14
  for name, error in found.items():  # rounded to 8 or 16 bits, a number may fall to either side
    assert error <= (1e-3 if "pooled" in name or "float8" in memory else 1e-5), (name, error)


def test_the_death_of_a_host_ends_the_others(tmp_path):
  survivor, victim = two_hosts(tmp_path, steps=10**6)
  while not (tmp_path / "checkpoints" / "2").is_dir():
    assert survivor.poll() is None is victim.poll()
    time.sleep(0.2)
  victim.kill()
  said = survivor.communicate(timeout=90)[0]  # 30 s of silence, and what a slow machine takes beside
  victim.communicate()
  assert survivor.returncode != 0
  # The service's words, or a failed program's.
  assert re.search("another (task died|host has died)", said), said[-2000:]
  on_two_hosts(tmp_path, steps=max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) + 2)


@pytest.mark.parametrize(("end", "told"), [("os.abort()", 1), ("sys.exit(2)", 0), ("1 / 0", 0), ("pass", 0)])
def test_a_process_that_is_aborted_has_a_witness(end, told):
  code = f"import os, sys; from sfjax import cluster; cluster._witnessed(); {end}"
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert len(re.findall("error: process .* another host has died; rerun on all .*save\n", run.stderr)) == told, (
    run.stderr
  )
  assert (run.returncode == 0) == (end == "pass")


def test_a_program_that_fails_among_hosts_is_told_as_a_death(monkeypatch):
  def fail():
    with cluster.explained():
      raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: connection closed\nmore")

  with pytest.raises(jax.errors.JaxRuntimeError):  # on one host it is what it says
    fail()
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match="another host has died, or this one failed .*connection closed.; rerun on all"):
    fail()


def test_hosts_that_are_done_wait_for_the_one_that_exports(monkeypatch):
  told = {}
  monkeypatch.setattr(jax.distributed, "initialize", lambda *who, **how: told.update(how))
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  monkeypatch.setattr(cluster, "_witnessed", lambda: None)
  cluster.join("localhost:1234", 2, 0)
  assert told["shutdown_timeout_seconds"] >= 3600 and told["heartbeat_timeout_seconds"] <= 60


def test_a_run_goes_on_with_the_batches_that_it_began_with():
  config = make("")
  of = lambda *batches: dataclasses.replace(
    config, train=dataclasses.replace(config.train, stages=tuple(Stage(1.0, chunks=1, batch=b) for b in batches))
  )
  found = lambda *given: [s.batch for s in training.with_batches(*given).train.stages]
  assert found(of(0, 6)) == [jax.device_count(), 6]
  assert found(of(0, 6), of(8, 4)) == [8, 6] and found(of(0, 6), of(0, 4)) == found(of(0, 6))


def test_what_is_split_and_what_is_whole():
  tree = {"matrix": np.zeros((3, 8, 4)), "odd": np.zeros((3, 5)), "vector": np.zeros(8)}
  tree |= {
    "blocks": {
      "cross_attn": {"o": {"kernel": np.zeros((3, 8, 8)), "bias": np.zeros((3, 8))}, "norm_q": np.zeros((3, 8))}
    }
  }
  of = lambda *shape: [tuple(s.spec) for s in jax.tree.leaves(cluster.shardings(AbstractMesh(shape, AXES), tree))]
  rest = [(None, "fsdp", None), (None, None), (None,)]
  assert of(2, 2, 2, 1) == of(4, 2, 1, 1) == [(None, "fsdp"), (None, "fsdp"), (None, "fsdp", None), *rest]
  assert of(2, 2, 1, 2) == [(None, "tensor"), (None, "fsdp"), (None, "tensor", "fsdp"), *rest]


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
  with pytest.raises(UserError, match="config.train.tensor: 2 does not divide 1 devices"):
    cluster.make_mesh(1, 2)
  with pytest.raises(UserError, match="config.train.fsdp: 3 does not divide 2 groups of 4 devices"):
    cluster.mesh_shape(8, 3, 4)
  with pytest.raises(UserError, match="config.train.context: 3 does not divide 4 groups of 2 devices"):
    cluster.mesh_shape(8, 1, 2, 3)
  config = make("")
  train = dataclasses.replace(config.train, stages=(Stage(1.0, chunks=7, batch=8),), context=2)
  with pytest.raises(UserError, match="config.train.context: 2 does not divide a stage's 7 chunks"):
    training.check_context(dataclasses.replace(config, train=train))
  distilled = dataclasses.replace(config.distill, teacher="T")
  with pytest.raises(UserError, match="config.train.context: 2; with a teacher want 1"):
    training.check_context(dataclasses.replace(config, train=train, distill=distilled))
  with pytest.raises(UserError, match="config.train.tensor: 3 does not divide config.model's 2 heads and ffn_dim 48"):
    cluster.check_tensor(3, training.models(make("")))
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
