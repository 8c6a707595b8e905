"""Trajectories of a tiny Wan2.1, asked by the prompts of a file, and a causal model that begins with them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import sample
from sfjax import captions, checkpoint, ode, rollout, training, wan
from sfjax.attention import parallel_attention
from sfjax.config import Config, DataConfig, Stage, load_config, to_dataclass
from sfjax.errors import UserError
from sfjax.flow import SamplerConfig
from sfjax.parts import load_model
from sfjax.routing import MemoryConfig
from tests.wan.test_sample import folder, own_cache  # noqa: F401, fixtures

PROMPTS = ["a cat &amp; a dog", "a boat", "rain on a window"]
GUIDANCE, STEPS = 3.0, 4


def write(folder, out, *flags):  # noqa: F811
  prompts = out.parent / "prompts.txt"
  prompts.write_text("\n".join(PROMPTS))
  line = ["--checkpoint", folder, "--out", out, "--prompts", prompts, "--latents", 6, "--pairs", 4, "--batch", 2]
  ode.main([str(x) for x in (*line, "--steps", STEPS, "--levels", 2, "--guidance", GUIDANCE, *flags)])


@pytest.fixture(scope="module")
def pairs(folder, tmp_path_factory):  # noqa: F811
  with pytest.MonkeyPatch.context() as m:
    m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    out = tmp_path_factory.mktemp("pairs") / "whole"
    write(folder, out)
  return out


@pytest.fixture
def config(folder, pairs):  # noqa: F811
  """configs/wan_1_3b.py:ode at the tiny model's sizes, two chunks a clip."""
  config = to_dataclass(Config, load_config("configs/wan_1_3b.py:ode"))
  own = to_dataclass(Config, checkpoint.load_config(folder))
  stages = (Stage(1.0, chunks=2, batch=0),)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(own.model, dtype="float32", param_dtype="float32", remat="full"),
    memory=own.memory,
    sampler=dataclasses.replace(config.sampler, steps=2),
    data=DataConfig(source="ode", path=str(pairs)),
    train=dataclasses.replace(
      config.train, steps=2, stages=stages, lr=1e-3, warmup=0, init=str(folder), threads=1, log_every=1
    ),
  )


def test_they_are_eulers_with_the_negative_prompt(folder, pairs, config):  # noqa: F811
  """Written out with velocities, two passes in turn, in the model's bfloat16: states agree within its rounding."""
  own = to_dataclass(Config, checkpoint.load_config(folder))
  model = dataclasses.replace(own.model, chunk_frames=6, param_dtype=own.model.dtype)
  params = load_model(folder, {"dit": rollout.abstract_params(model)}, "")
  text = captions.text(config, [PROMPTS[1]], wan.NEGATIVE)
  attend = parallel_attention(model, MemoryConfig(window=1), 1)

  def velocity(x, sigma, rows):
    kv = rollout.text_kv(model, params["dit"], jnp.asarray(rows, model.dtype))
    level = jnp.full((1, 1, 6), 1000 * sigma)
    return rollout.apply(model, params["dit"], x[:, None], level, jnp.zeros(1, jnp.int32), kv, attend)[0][:, 0]

  read = ode.Pairs(str(pairs), SamplerConfig("few_step", 2, wan.MANY_STEPS.shift))
  assert read.captions == [PROMPTS[i % 3] for i in range(4)]
  states = read[1]["states"].astype(np.float32)
  sigmas = SamplerConfig("euler", STEPS, wan.MANY_STEPS.shift).sigmas
  x, rounding = jnp.asarray(states[:1]), (2 * GUIDANCE - 1) * 2**-8  # bfloat16's, of 3 told - 2 away
  for i, (sigma, later) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
    if i == STEPS // 2:
      np.testing.assert_allclose(states[1:2], x, atol=rounding * np.abs(x).max())
    told, away = velocity(x, sigma, text.prompt), velocity(x, sigma, text.null)
    x = x + (later - sigma) * (away + GUIDANCE * (told - away))
  np.testing.assert_allclose(states[2:], x, atol=rounding * np.abs(x).max())
  assert np.abs(told - away).mean() > 0.05 * np.abs(told).mean()  # so that it matters which is led away from


def test_parts_make_the_same_shards(folder, pairs, tmp_path):  # noqa: F811
  for part in ("1/2", "0/2"):
    write(folder, tmp_path / "parts", "--part", part)
  files = sorted(f.name for f in pairs.iterdir())
  assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == files and len(files) == 3
  for name in files:
    assert (tmp_path / "parts" / name).read_bytes() == (pairs / name).read_bytes()


def test_a_causal_model_begins_with_them(config, folder, tmp_path, monkeypatch):  # noqa: F811
  assert training.task(config) is ode and config.sampler.kind == "few_step" and config.sampler.guidance == 1
  ode.source(config, config.train.stages[0])
  before = checkpoint.named(load_model(folder, {"dit": rollout.abstract_params(config.model)}, "")["dit"])
  with monkeypatch.context() as m:
    m.setattr(wan, "load_text", None)  # all that will be told has been embedded
    model = training.train(config, tmp_path / "run")
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 2 and all(np.isfinite(line["x0_error"]) and line["grad_norm"] > 0 for line in lines)
  after = checkpoint.named(wan.load_dit(model, config.model))
  assert any(np.any(np.asarray(after[name]) != np.asarray(before[name])) for name in before)
  sample.main(["--checkpoint", str(model), "--prompt", "a boat", "--seconds", "0.5", "--out", str(tmp_path / "out")])
  assert (tmp_path / "out" / "00.mp4").stat().st_size > 0


def test_clips_of_another_size_are_refused(config):
  other = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_size=(12, 12)))
  with pytest.raises(UserError, match=r"config.model: latents of \[12, 12, 16\]; those at .* are of \[8, 12, 16\]"):
    ode.source(other, other.train.stages[0])


@pytest.mark.parametrize(
  ("flags", "line"),
  [
    (["--part", "2/2"], "--part: '2/2'; want I/N, I from 0 to N - 1"),
    (["--part", "one"], "--part: 'one'; want I/N"),
    (["--latents", 0], "--latents: 0; want at least 1"),
    (["--latents", 7], "--latents: 7; tile: "),
    (["--prompts", "/nowhere"], "--prompts: /nowhere cannot be read"),
    (["--prompts", ""], "--prompts: none; Wan2.1's models want a text file, one prompt a line"),
  ],
)
def test_flags_that_are_refused(folder, tmp_path, flags, line, capsys):  # noqa: F811
  with pytest.raises(SystemExit):
    write(folder, tmp_path / "out", *flags)
  assert line in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_teacher_without_a_text_encoder_is_refused(folder, tmp_path, capsys):  # noqa: F811
  (tmp_path / "bare").mkdir()
  (tmp_path / "bare" / "config.json").write_text((folder / "config.json").read_text())
  with pytest.raises(SystemExit):
    write(tmp_path / "bare", tmp_path / "out")
  assert "holds no text encoder for the prompts; convert one into it" in capsys.readouterr().err
