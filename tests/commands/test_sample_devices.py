"""A video on several devices is that of one: each has its rows of a chunk and its heads of the memory; another decodes."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

import sample
from sfjax import checkpoint, cluster, teacher_forcing
from sfjax.checkpoint import load_arrays
from sfjax.config import to_dict
from sfjax.errors import UserError
from sfjax.model import ModelConfig
from sfjax.parts import with_decoder_apart
from sfjax.sampling import Sampler

FLAGS = ("--seconds", "1", "--save_state")


@pytest.fixture(scope="module")
def two_heads(config, tmp_path_factory):
  """A folder of the tiny model with two heads."""
  folder = tmp_path_factory.mktemp("models") / "heads"
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, heads=2))
  rng = np.random.default_rng(0)
  noise = lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype)
  checkpoint.export(folder, jax.tree.map(noise, teacher_forcing.init_model(config)), to_dict(config), {})
  return folder


def on_two_devices(*flags):
  """sample.py in a process of 4 devices, two of which share the tokens."""
  env = os.environ | dict(JAX_NUM_CPU_DEVICES="4", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  line = [
    sys.executable,
    "-W",
    "error::DeprecationWarning",
    "sample.py",
    "--devices",
    "2",
    *map(str, flags),
  ]
  return subprocess.run(line, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("apart", [[], ["--decode_apart"]])
def test_a_video_goes_on_on_two_devices_as_on_one(two_heads, tmp_path, apart):
  """A state of one device, and from it a stretch under two prompts; the states after it are compared."""
  of = lambda name: ("--checkpoint", two_heads, "--out", tmp_path / "out", *FLAGS, tmp_path / name)
  sample.main([*map(str, (*of("begun"), "--prompt", "a red 3"))])
  more = ("--continue_state", tmp_path / "begun", "--prompt_schedule", "0: a red 3; 0.8: a blue 7")
  sample.main([*map(str, (*of("one"), *more))])
  run = on_two_devices(*of("two"), *more, *apart)
  assert run.returncode == 0, run.stderr[-2000:]
  held = json.loads((tmp_path / "out" / "run.json").read_text())["device_bytes"]
  assert {name: held["predicted"][name] for name in held["measured"] if name != "total"} == {
    name: n for name, n in held["measured"].items() if name != "total"
  }  # by each of the two
  assert "persistent" in held["measured"]
  assert held["workspace"].keys() == ({"chunk"} if apart else {"chunk", "decode"})
  assert ("decoder" in held) == ("codec_state" not in held["measured"]) == bool(apart)
  want, got = load_arrays(tmp_path / "one"), load_arrays(tmp_path / "two")
  assert want.keys() == got.keys() and {"k", "v", "pooled", "score", "cross_k", "made"} < want.keys()
  for name, x in want.items():
    if x.dtype == np.float32:
      assert np.linalg.norm(got[name] - x) <= 1e-5 * np.linalg.norm(x), name
    elif name != "pooled":  # of bfloat16: what lies between two numbers may fall to either
      np.testing.assert_array_equal(got[name], x, err_msg=name)
    else:
      np.testing.assert_allclose(got[name].astype(np.float32), x.astype(np.float32), rtol=2**-7, atol=1e-5)


def test_what_is_refused(two_heads, monkeypatch):
  with pytest.raises(UserError, match="--devices: 2; this machine has 1"):
    Sampler(two_heads, devices=2)
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices() * 4)
  with pytest.raises(UserError, match="--devices: 3 does not divide the model's 2 heads"):
    Sampler(two_heads, devices=3)
  with pytest.raises(UserError, match="--decode_apart: wants a device beside the 4 of --devices; this machine has 4"):
    with_decoder_apart(types.SimpleNamespace(mesh=types.SimpleNamespace(size=4)))
  with pytest.raises(UserError, match="--decode_apart: wants a device beside the 4 of --devices"):
    Sampler("no folder is read", devices=4, decode_apart=True)
  flat = dataclasses.replace(ModelConfig.digits(), tile=(1, 4, 4))
  with pytest.raises(UserError, match="--devices: 3; the model's tiles span 1 of a chunk's 3 frames, which wants 1"):
    cluster.tokens_mesh(3, flat)
