"""A teacher's trajectories: what is kept of them, shards that come back as they were, and training on them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import checkpoint, ode, rollout, teacher_forcing, training
from sfjax.attention import Parallel
from sfjax.config import Config, DataConfig, Stage, load_config, to_dataclass, to_dict
from sfjax.errors import UserError
from sfjax.flow import SamplerConfig
from sfjax.routing import MemoryConfig
from sfjax.text import WordEncoder

FEW = SamplerConfig("few_step", steps=2, shift=5.0)


@pytest.fixture(scope="module")
def config():
  config = to_dataclass(Config, load_config("configs/digits.py:tiny"))
  return dataclasses.replace(config, sampler=FEW)


@pytest.fixture(scope="module")
def teacher(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("teacher") / "model"
  model = dataclasses.replace(config.model, chunk_frames=6, layers=1)
  own = dataclasses.replace(config, model=model, memory=MemoryConfig(window=1), sampler=SamplerConfig(shift=5.0))
  noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape)
  params = jax.tree.map(noise, teacher_forcing.init_model(own))
  checkpoint.export(folder, jax.device_get(params), to_dict(own), {})
  return folder


def write(teacher, out, *flags):
  line = [
    "--checkpoint",
    teacher,
    "--out",
    out,
    "--pairs",
    4,
    "--batch",
    2,
    "--steps",
    4,
    "--levels",
    2,
    "--guidance",
    3,
  ]
  ode.main([str(x) for x in (*line, *flags)])


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
  out = tmp_path_factory.mktemp("pairs") / "pairs"
  write(teacher, out)
  return out


def test_states_lie_on_the_way_from_noise_to_the_clip():
  """A denoiser that always says `clip` is solved exactly: x_sigma = (1 - sigma) clip + sigma noise."""
  noise, clip = jax.random.normal(jax.random.key(0), (2, 3, 4, 2, 2, 5)), jnp.float32(0.7)
  sampler = SamplerConfig("euler", steps=6, shift=5.0)
  states = ode.trajectory(lambda x, sigma: jnp.full_like(x, clip), sampler, noise[0], 3)
  for i, sigma in enumerate(SamplerConfig("few_step", steps=3, shift=5.0).sigmas):
    np.testing.assert_allclose(states[:, i], (1 - sigma) * clip + sigma * noise[0], atol=1e-5)


def test_what_is_written(folder):
  pairs = ode.Pairs(str(folder), FEW)
  assert len(pairs) == 4 and sorted(f.name for f in folder.iterdir()) == [
    "pairs-00000.array_record",
    "pairs-00001.array_record",
    "pairs.json",
  ]
  for i in range(4):
    states = pairs[i]["states"]
    assert states.shape == (3, 6, 32, 32, 48) and states.dtype == np.float16
    assert abs(states[0].astype(np.float32).std() - 1) < 0.01 and np.abs(states[2] - states[0]).max() > 0.1
  assert (
    len({pairs[i]["states"][0].tobytes() for i in range(4)}) == 4 and len({pairs[i]["caption"] for i in range(4)}) > 1
  )


def test_a_rerun_makes_what_is_missing_and_nothing_else(teacher, folder, tmp_path):
  before = {f.name: f.read_bytes() for f in folder.glob("*.array_record")}
  (folder / "pairs-00001.array_record").unlink()
  with pytest.raises(UserError, match=r"lacks 1 of 2 shards, first pairs-00001.array_record"):
    ode.Pairs(str(folder), FEW)
  times = (folder / "pairs-00000.array_record").stat().st_mtime_ns
  write(teacher, folder)
  assert {f.name: f.read_bytes() for f in folder.glob("*.array_record")} == before
  assert (folder / "pairs-00000.array_record").stat().st_mtime_ns == times


def test_a_network_that_names_the_clip_scores_zero(config, folder, monkeypatch):
  pairs, seen = ode.Pairs(str(folder), FEW), {}
  batch = {
    "states": np.stack([pairs[i]["states"] for i in range(2)]),
    "caption": [pairs[i]["caption"] for i in range(2)],
  }
  clean = batch["states"][:, -1].astype(np.float32).reshape(2, 2, 3, 32, 32, 48)
  wrong = 0.0

  def network(model, params, x, t, chunk, *_):
    seen.update(x=x, t=t)
    return jnp.concatenate([x[:, :1], clean + wrong], 1), None, Parallel(None, None, None, jnp.zeros(model.layers))

  monkeypatch.setattr(rollout, "apply", network)
  monkeypatch.setattr(rollout, "text_kv", lambda *_: None)
  text = {"text": WordEncoder(16, 64).init(0), "dit": None}
  stage = Stage(1.0, chunks=2, batch=2)
  value = lambda key: ode.loss(config, stage, text, ode.inputs(config, batch), jax.random.key(key), jnp.arange(2))[0]
  assert value(0) == 0
  np.testing.assert_array_equal(seen["x"][:, 0], clean[:, 0])  # the context is the clip itself
  assert not seen["t"][:, 0].any()
  levels = set()
  for key in range(8):
    value(key)
    for i, level in enumerate(FEW.sigmas[:-1]):
      for clip, chunk in zip(*np.nonzero(np.isclose(seen["t"][:, 1:, 0], 1000 * level)), strict=True):
        state = batch["states"][clip, i].reshape(2, 3, 32, 32, 48)[chunk]
        np.testing.assert_array_equal(seen["x"][clip, 1 + chunk], state.astype(np.float32))
        levels.add((int(clip), int(chunk), i))
  assert len(levels) == 8  # every chunk of every clip was seen at every level, each by its own draw
  wrong = 2.0
  assert value(0) == 4


def test_training_on_them(config, folder, tmp_path):
  stages = (Stage(1.0, chunks=2, batch=2),)
  train = dataclasses.replace(config.train, steps=2, stages=stages, warmup=1, log_every=1, threads=1)
  config = dataclasses.replace(config, data=DataConfig(source="ode", path=str(folder)), train=train)
  assert training.task(config) is ode
  model = training.train(config, tmp_path / "run")
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert (model / "params.npz").is_file() and all(np.isfinite(line["x0_error"]) for line in lines)


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (lambda c, f: dataclasses.replace(c, data=DataConfig(source="ode", path="nowhere")), "'nowhere' is no folder"),
    (lambda c, f: dataclasses.replace(c, sampler=dataclasses.replace(FEW, shift=4.0)), "config.sampler: its levels"),
    (lambda c, f: dataclasses.replace(c, sampler=dataclasses.replace(FEW, steps=4)), "config.sampler: its levels"),
    (lambda c, f: c, "config.train.stages: chunks 5, firsts 0; these clips have 6 latents"),
  ],
)
def test_what_cannot_be_trained_on(config, folder, change, line):
  config = dataclasses.replace(config, data=DataConfig(source="ode", path=str(folder)))
  with pytest.raises(UserError, match=line):
    ode.source(change(config, folder), Stage(1.0, chunks=5, batch=2))


@pytest.mark.parametrize(
  ("flags", "line"),
  [
    (["--levels", 3], "--levels: 3 does not divide --steps 4"),
    (["--pairs", 3], "--pairs: 3 is not a multiple of --batch 2"),
    (["--batch", 0], "--batch: 0; want at least 1"),
    (["--shift", 0], "--shift: 0.0; want a positive number"),
    (["--seed", 1], "holds pairs of other flags"),
  ],
)
def test_flags_that_are_refused(teacher, folder, flags, line, capsys):
  with pytest.raises(SystemExit):
    write(teacher, folder, *flags)
  assert line in capsys.readouterr().err
