"""A run that is interrupted and resumed ends where the unbroken one ends, bit for bit; a bad loss loses nothing."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import teacher_forcing, training
from sfjax.config import Config, DataConfig, Stage, TrainConfig, load_config, to_dataclass, to_dict
from sfjax.errors import UserError
from sfjax.metrics import MetricWriter
from sfjax.model import ModelConfig
from sfjax.optimizer import learning_rate, optimizer

STEPS = 4


@pytest.fixture(scope="module")
def config():
  config = to_dataclass(Config, load_config("configs/digits.py:tiny"))
  stages = (Stage(0.5, chunks=2, batch=2, firsts=2), Stage(1.0, chunks=1, batch=2, dense=True))
  return dataclasses.replace(config, train=TrainConfig(STEPS, stages, warmup=2, log_every=1, save_every=10, threads=1))


def final_state(config, workdir):
  like = training.task(config).state(config)
  with training.Checkpoints(workdir / "checkpoints", 2, 0) as checkpoints:
    return checkpoints.restore(like)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  training.train(dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=3)), workdir)
  # A stage's metrics are its own: what is not told yet is told at its end.
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [(line["step"], "flow_firsts" in line) for line in lines] == [(2, True), (3, False), (4, False)]
  return final_state(config, workdir)


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_ctrl_c_saves_and_the_resumed_run_equals_the_unbroken_one(
  config, unbroken, tmp_path, monkeypatch, capsys, offload
):
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, offload=offload))
  advance, steps, handler = MetricWriter.advance, [], signal.getsignal(signal.SIGINT)

  def interrupt(self):
    advance(self)
    steps.append(1)
    if len(steps) == 2:
      signal.raise_signal(signal.SIGINT)

  with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
    m.setattr(MetricWriter, "advance", interrupt)
    training.train(config, tmp_path)
  assert f"saved step 2 in {tmp_path / 'checkpoints'}" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGINT) is handler
  model = training.train(config, tmp_path)
  assert (model / "params.npz").is_file()
  state, meta = final_state(config, tmp_path)
  assert int(state["step"]) == STEPS
  jax.tree.map(np.testing.assert_array_equal, state, unbroken[0])


def test_sigterm_ends_with_exit_code_0_and_a_second_one_at_once():
  before = signal.getsignal(signal.SIGTERM)
  with training.StopSignal() as stop:
    signal.raise_signal(signal.SIGTERM)
    assert stop.asked == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit) as done:
      stop.leave()
  assert done.value.code == 0 and signal.getsignal(signal.SIGTERM) is before


def test_gradients_that_stay_not_finite_stop_the_run_with_its_weights_as_they_were(config, tmp_path, monkeypatch):
  loss = teacher_forcing.loss

  def spoiled(config, stage, params, *given):
    value, metrics = loss(config, stage, params, *given)
    moved = jnp.any(params["dit"]["head"]["bias"] != 0)  # from the third step on: the first one's rate is 0
    return jnp.where(moved, jnp.nan, 1) * value, metrics

  monkeypatch.setattr(teacher_forcing, "loss", spoiled)
  stages = config.train.stages[1:]
  train = dataclasses.replace(config.train, save_every=2, patience=2, warmup=1, stages=stages)
  config = dataclasses.replace(config, train=train)
  with pytest.raises(UserError, match=r"step 4: 2 gradients in a row are not finite; the newest checkpoint is step 2"):
    training.train(config, tmp_path)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["skipped"] for line in lines] == [0, 0, 1]
  state, _ = final_state(config, tmp_path)
  assert int(state["step"]) == 2 and all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_only_matrices_decay_and_the_rate_warms_up_and_falls(config):
  heavy = dataclasses.replace(config, train=dataclasses.replace(config.train, weight_decay=1.0, lr=0.1, warmup=1))
  params = teacher_forcing.init_model(config)
  tx = optimizer(heavy.train)
  state = tx.init(params)
  zero = jax.tree.map(jnp.zeros_like, params)
  for _ in range(2):  # the first step of the warm-up has rate 0
    updates, state = tx.update(zero, state, params)
  moved = jax.tree_util.tree_map_with_path(
    lambda path, u, p: (path[-1].key == "kernel", bool(jnp.any(u))), updates, params
  )
  for matrix, changed in jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple)):
    assert matrix or not changed
  assert updates["dit"]["head"]["kernel"].shape and np.any(updates["dit"]["patch_embedding"]["kernel"])
  rate = learning_rate(TrainConfig(100, config.train.stages, lr=1.0, warmup=10, decay=0.2))
  np.testing.assert_allclose([rate(i) for i in (0, 5, 10, 80, 90, 100)], [0, 0.5, 1, 1, 0.525, 0.05], rtol=1e-6)


def test_a_rerun_may_change_how_long_and_how_often_but_not_the_experiment(config, unbroken, tmp_path):
  old = unbroken[1]["config"]
  change = lambda **kw: to_dict(dataclasses.replace(config, train=dataclasses.replace(config.train, **kw)))
  plain = lambda c: json.loads(json.dumps(c))
  training.check_same_experiment(tmp_path, old, plain(change(steps=9, save_every=3, workers=2)))
  with pytest.raises(UserError, match=r"holds a run with config.train.lr = 0.001, not 0.5"):
    training.check_same_experiment(tmp_path, old, plain(change(lr=0.5)))
  with pytest.raises(UserError, match=r"config.train.stages = .*'batch': 2.*not .*'batch': 4"):
    stages = (dataclasses.replace(config.train.stages[0], batch=4), config.train.stages[1])
    training.check_same_experiment(tmp_path, old, plain(change(stages=stages)))


@pytest.mark.parametrize(
  "change, match",
  [
    (dict(data=DataConfig(source="folder")), "config.data.path: ''"),
    (
      dict(data=DataConfig(source="tape")),
      "config.data.source: 'tape'; accepted are digits, folder, latents, ode, prompts",
    ),
    (dict(model=ModelConfig.digits(latent_size=(16, 16))), r"latent_size: \(16, 16\); digits want \(32, 32\)"),
    (dict(model=ModelConfig.digits(linear="float8")), "config.model.linear: float8; want dtype in training"),
    (dict(train=TrainConfig(1, (Stage(1.0, 1, 1),), init="absent")), "config.train.init: absent is not a folder"),
  ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(config, tmp_path, change, match):
  with pytest.raises(UserError, match=match):
    training.train(dataclasses.replace(config, **change), tmp_path)
  assert not list(tmp_path.iterdir())
