"""A model between two: its numbers, its config, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import average, checkpoint, teacher_forcing
from sfjax.config import read_config, to_dict


def tiny(**overrides):
  return read_config("configs/digits.py:tiny", overrides)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Two models of one architecture, and one that is wider."""
  out = tmp_path_factory.mktemp("models")
  for name, config in (
    ("one", tiny()),
    ("other", tiny(**{"train.seed": "5", "sampler.steps": "7"})),
    ("wide", tiny(**{"model.ffn_dim": "96"})),
  ):
    checkpoint.export(out / name, teacher_forcing.init_model(config), to_dict(config), {})
  return out


def test_every_array_lies_between(folders, tmp_path):
  average.main([str(folders / "one"), str(folders / "other"), "--weight", "0.25", "--out", str(tmp_path / "new")])
  one, other, new = (
    checkpoint.load_arrays(x / "params.npz") for x in (folders / "one", folders / "other", tmp_path / "new")
  )
  assert one.keys() == other.keys() == new.keys()
  moved = 0
  for name, x in new.items():
    wide = lambda y: np.asarray(y, np.float32)
    want = 0.75 * wide(one[name]) + 0.25 * wide(other[name])
    np.testing.assert_allclose(wide(x), want, rtol=2**-8, atol=1e-30, err_msg=name)  # once rounded to bfloat16
    moved += not np.array_equal(x, one[name])
  assert moved > 10
  config, card = (json.loads((tmp_path / "new" / f"{name}.json").read_text()) for name in ("config", "card"))
  assert config == json.loads((folders / "one" / "config.json").read_text()) and card["config"]["weight"] == 0.25


def test_ends_are_the_models_themselves():
  a, b = {"x": jnp.arange(3.0) / 7}, {"x": jnp.ones(3) / 3}
  np.testing.assert_array_equal(average.between(a, b, 0.0)["x"], a["x"])
  np.testing.assert_array_equal(average.between(a, b, 1.0)["x"], b["x"])


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ("one other --weight 1.5 --out new", "--weight: 1.5; want 0 to 1"),
    ("one wide --out new", "has model.ffn_dim = 96; want MODEL's, 64"),
    ("one absent --out new", "OTHER: "),
    ("absent other --out new", "MODEL: "),
    ("one other --out one", "is there already; want a new folder"),
  ],
)
def test_what_is_refused(line, says, folders, monkeypatch, capsys):
  monkeypatch.chdir(folders)
  with pytest.raises(SystemExit) as stop:
    average.main(line.split())
  assert stop.value.code == 2 and says in capsys.readouterr().err and not (folders / "new").exists()
