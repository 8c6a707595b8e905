"""Distilling a tiny Wan2.1: a student, its teacher and a text encoder from converted folders, and nothing but prompts."""

import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
from sfjax import checkpoint, parts, sampling, self_forcing, teacher_forcing, training, wan
from sfjax.config import Config, DataConfig, Stage, load_config, to_dataclass
from sfjax.data.loader import PromptFile
from sfjax.errors import UserError
from tests.wan.test_sample import folder, own_cache  # noqa: F401, fixtures

PROMPTS = ["a cat &amp; a dog", "a boat", "", "  ", "rain on a window"]


@pytest.fixture
def config(folder, tmp_path):  # noqa: F811
  """Two chunks that are judged whole, on the prompts of a file."""
  (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
  config = to_dataclass(Config, load_config("configs/wan_1_3b.py:student"))
  own = to_dataclass(Config, checkpoint.load_config(folder))
  stages = (Stage(1.0, chunks=2, batch=0),)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(own.model, dtype="float32", remat="full"),
    memory=own.memory,
    sampler=dataclasses.replace(config.sampler, steps=2),
    data=DataConfig(source="prompts", path=str(tmp_path / "prompts.txt")),
    train=dataclasses.replace(config.train, steps=2, stages=stages, lr=1e-4, init=str(folder), threads=1),
    distill=dataclasses.replace(config.distill, teacher=str(folder), latents=6, critic_updates=1, critic_lr=1e-4),
  )


def moved(old, new) -> set[str]:
  old, new = checkpoint.named(old), checkpoint.named(new)
  return {name for name in old if np.any(np.asarray(old[name]) != np.asarray(new[name]))}


def test_a_student_learns_from_prompts_alone(config, folder, tmp_path, monkeypatch):  # noqa: F811
  config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, commit="last", last_sigma=0.4))
  loads, load_text = [], wan.load_text
  monkeypatch.setattr(wan, "load_text", lambda *a: loads.append(1) or load_text(*a))
  before, state, fixed = {}, self_forcing.state(config), self_forcing.fixed(config)
  assert training.task(config) is self_forcing and state["params"].keys() == fixed.keys() == {"dit"}
  before = jax.tree.map(np.asarray, (state["params"], state["critic"], fixed))
  model = training.train(config, tmp_path / "run")
  assert len(loads) == 1  # all prompts before the first step, and nothing new afterwards
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 2 and all(np.isfinite(x) for line in lines for x in line.values())
  assert all(line["not_finite"] == 0 and line["skipped"] == 0 and line["grad_norm"] > 0 for line in lines)
  with training.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    state, _ = checkpoints.restore(state)
  for part, old in (("params", before[0]), ("critic", before[1])):
    assert moved(old, state[part]) == set(checkpoint.named(old))
  assert not moved(before[2], self_forcing.fixed(config))
  exported = wan.load_dit(model, dataclasses.replace(config.model, param_dtype="bfloat16"))
  assert not moved(jax.tree.map(lambda x: x.astype(jnp.bfloat16), state["ema"]["dit"]), exported)
  sample.main(["--checkpoint", str(model), "--prompt", "a cat", "--seconds", "0.5", "--out", str(tmp_path / "out")])
  assert (tmp_path / "out" / "00.mp4").stat().st_size > 0
  record = json.loads((tmp_path / "out" / "run.json").read_text())
  assert record["config"]["sampler"]["commit"] == "last"  # as it was trained, unless told otherwise
  assert sampling.Sampler(model, commit="clean").config.sampler.commit == "clean"
  with pytest.raises(UserError, match="--steps: 1; the model's last_sigma: 0.4; want more than one step"):
    sampling.Sampler(model, steps=1)


@pytest.mark.parametrize("linked", [True, False])
def test_what_stands_around_the_student_comes_along(config, folder, tmp_path, monkeypatch, linked):  # noqa: F811
  def no_link(*_):
    raise OSError("another file system")

  if not linked:
    monkeypatch.setattr(os, "link", no_link)
  params = teacher_forcing.init_model(config)
  for _ in range(2):  # a rerun that had nothing to do exports again
    parts.export_model(tmp_path / "model", params, config, {})
  files = {f.relative_to(folder) for name in ("vae", "text") for f in (folder / name).rglob("*") if f.is_file()}
  files |= {pathlib.Path(name) for name in ("vae.json", "text.json", "tokenizer.json")}
  for name in files:
    ours, theirs = tmp_path / "model" / name, folder / name
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.samefile(theirs) == (linked and len(name.parts) > 1), name
  assert not list((tmp_path / "model").glob(".*"))
  bare = dataclasses.replace(config, train=dataclasses.replace(config.train, init=""))
  parts.export_model(tmp_path / "other", params, dataclasses.replace(bare, distill=Config.distill), {})
  with pytest.raises(UserError, match="holds no vae; convert one into it"):
    parts.load_parts(tmp_path / "other")


def test_a_teacher_is_held_as_it_computes_and_a_critic_as_it_learns(config):
  half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
  of = lambda tree: {x.dtype for x in jax.tree.leaves(tree)}
  assert of(self_forcing.fixed(half)) == {jnp.dtype("bfloat16")}
  assert of(self_forcing.state(half)["critic"]) == {jnp.dtype("float32")}
  assert self_forcing.teacher_model(half).chunk_frames == self_forcing.critic_model(half).chunk_frames == 6


SCRIPT = """
import dataclasses, pickle, sys
import jax, numpy as np
from sfjax import cluster, self_forcing, teacher_forcing, training_ledger
config = pickle.load(open(sys.argv[1], "rb"))
mesh = cluster.make_mesh(2, 2)
fresh = dataclasses.replace(config, train=dataclasses.replace(config.train, init=""))
for task, config in (self_forcing, config), (teacher_forcing, fresh):
  whole, split = task.state(config), task.state(config, mesh)
  jax.tree.map(np.testing.assert_array_equal, whole, split)
  for x, where in zip(jax.tree.leaves(split), jax.tree.leaves(cluster.shardings(mesh, whole)), strict=True):
    assert x.sharding == where, (x.sharding, where)
split = self_forcing.fixed(config, mesh)
jax.tree.map(np.testing.assert_array_equal, self_forcing.fixed(config), split)
kernel = split["dit"]["blocks"]["ffn_in"]["kernel"]
assert kernel.addressable_shards[0].data.size * 4 == kernel.size
predicted = training_ledger.predict(config, self_forcing.teacher_model(config), self_forcing.critic_model(config), 4).held
held = self_forcing.state(config, mesh) | {"teacher": split}
of = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
assert {name: of(tree) for name, tree in held.items() if name != "step"} == {
  name: n for name, n in predicted.items() if name != "step"
}
"""


def test_a_state_that_is_made_in_its_shards_is_the_whole_one(config, tmp_path):
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, fsdp=2, tensor=2))
  (tmp_path / "config").write_bytes(pickle.dumps(config))
  env = os.environ | dict(JAX_NUM_CPU_DEVICES="4", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  line = [sys.executable, "-c", SCRIPT, str(tmp_path / "config")]
  run = subprocess.run(line, env=env, capture_output=True, text=True, timeout=600)
  assert run.returncode == 0, run.stderr[-2000:]


def test_lines_of_a_file(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_text("\n".join(PROMPTS), "utf-8")
  assert PromptFile(str(file), "flag").lines == [p for p in PROMPTS if p.strip()]
  file.write_bytes(b"\xff\xfe")
  with pytest.raises(UserError, match=r"flag: .*prompts.txt cannot be read \(not UTF-8\)"):
    PromptFile(str(file), "flag")


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (dict(path=""), r"config.data.path: ''; want a text file, one prompt a line"),
    (dict(path="/nowhere"), r"config.data.path: /nowhere cannot be read \(No such file or directory\)"),
    (dict(path="EMPTY"), "config.data.path: .*empty.txt holds no prompt; want one a line"),
    (
      dict(source="folder"),
      "config.data.source: folder; Wan2.1's models want latents, ode, or prompts and a config.distill",
    ),
    (
      dict(source="latents"),
      "config.data.source: latents, and a config.distill.teacher; want one of the two, or prompts",
    ),
  ],
)
def test_prompts_that_are_refused(config, tmp_path, change, line):
  (tmp_path / "empty.txt").write_text(" \n\n")
  change = {k: str(tmp_path / "empty.txt") if v == "EMPTY" else v for k, v in change.items()}
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, **change))
  with pytest.raises(UserError, match=line):
    training.train(config, tmp_path / "run")


def test_what_else_is_refused(config, tmp_path):
  prompts = dataclasses.replace(config, distill=dataclasses.replace(config.distill, teacher=""))
  with pytest.raises(UserError, match="config.data.source: prompts; Wan2.1's .* prompts and a config.distill.teacher"):
    teacher_forcing.source(prompts, Stage(1.0, chunks=2, batch=1))
  digits = to_dataclass(Config, load_config("configs/digits.py:tiny"))
  with pytest.raises(UserError, match="config.data.source: prompts holds captions alone, not clips"):
    teacher_forcing.source(dataclasses.replace(digits, data=DataConfig(source="prompts")), Stage(1.0, 1, 1))
  longer = dataclasses.replace(config.distill, latents=7)
  with pytest.raises(UserError, match="config.distill.teacher: its clips have 7 latents; want a multiple of 3"):
    self_forcing.teacher_model(dataclasses.replace(config, distill=longer))
  (tmp_path / "config.json").write_text(json.dumps(json.loads((open(f"{config.train.init}/config.json")).read())))
  bare = dataclasses.replace(config, distill=dataclasses.replace(config.distill, teacher=str(tmp_path)))
  assert len(self_forcing.source(bare, bare.train.stages[0])) > 0  # the student's folder has a text encoder
  bare = dataclasses.replace(bare, train=dataclasses.replace(bare.train, init=""))
  with pytest.raises(UserError, match="config.distill.teacher .*, config.train.init '': neither holds a text encoder"):
    self_forcing.source(bare, bare.train.stages[0])
