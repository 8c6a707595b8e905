"""A tiny model folder, and both commands called in this process; equal configs share one compiled program."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import sample
import train
from sfjax import checkpoint, rollout, teacher_forcing, video
from sfjax.config import Config, load_config, to_dataclass, to_dict
from tests.rollout.conftest import cheap_compilation  # noqa: F401, a fixture


@pytest.fixture(scope="package")
def config():
  config = to_dataclass(Config, load_config("configs/digits.py:tiny"))
  return dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, steps=2))


@pytest.fixture(scope="package")
def model_folder(config, tmp_path_factory):
  rng = np.random.default_rng(0)
  noise = lambda p: (
    p + 0.1 * rng.normal(size=p.shape).astype(p.dtype)
  )  # a fresh head is zero: every video would be grey
  folder = tmp_path_factory.mktemp("models") / "tiny"
  checkpoint.export(
    folder, jax.tree.map(noise, teacher_forcing.init_model(config)), to_dict(config), {"made": "by a test"}
  )
  return folder


@pytest.fixture(scope="package", autouse=True)
def shared_programs():
  with pytest.MonkeyPatch.context() as m:
    m.setattr(rollout, "Compiled", functools.cache(rollout.Compiled))
    yield


class Run:
  """What a run of sample.py left: its frames before H.264, its folder and run.json."""

  def __init__(self, out, frames):
    self.out, self.frames = out, frames
    self.record = json.loads((out / "run.json").read_text())


@pytest.fixture
def run_sample(model_folder, tmp_path, monkeypatch):
  """Calls sample.py with flags; returns a Run."""

  def call(*flags, out="out"):
    frames, write = [], video.VideoWriter.write

    def record(self, part):
      frames.append(np.array(part))
      write(self, part)

    with monkeypatch.context() as m:
      m.setattr(video.VideoWriter, "write", record)
      sample.main(["--checkpoint", str(model_folder), "--out", str(tmp_path / out), *map(str, flags)])
    return Run(tmp_path / out, np.concatenate(frames))

  return call


@pytest.fixture
def refused(tmp_path, capsys):
  """Calls a command that must end with code 2 and one line, and leave no file but those there before; returns the line."""

  def call(main, *flags):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
      main(list(map(str, flags)))
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    return err

  return call


@pytest.fixture
def refused_sample(model_folder, tmp_path, refused):
  return lambda *flags: refused(sample.main, "--checkpoint", model_folder, "--out", tmp_path / "out", *flags)


@pytest.fixture
def refused_train(tmp_path, refused):
  def call(*flags, config="configs/digits.py:tiny"):
    return refused(train.main, "--config", config, "--workdir", tmp_path / "run", *flags)

  return call
