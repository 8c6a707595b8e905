"""Checkpoints: bit for bit, whole or absent, and one line that names what is wrong."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfjax import checkpoint
from sfjax.checkpoint import Checkpoints, export, load_arrays, load_config, load_params, save_arrays
from sfjax.errors import UserError


def params(seed=0, width=5):
  a, b = jax.random.split(jax.random.key(seed))
  return {"dit": {"w": jax.random.normal(a, (3, width)), "b": jax.random.normal(b, (width,))}}


def state(seed=0):
  p = params(seed)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return {
    "step": jnp.int32(seed),
    "params": p,
    "half": jax.random.normal(jax.random.key(seed), (7,), jnp.bfloat16),
    "quarter": jax.random.normal(jax.random.key(seed), (7,)).astype(jnp.float8_e4m3fn),
    "opt": tx.init(p),
    "keys": jax.random.split(jax.random.key(seed + 1), 3),
    "words": jax.random.key_data(jax.random.key(seed + 2)),
    "odd": jnp.float32([np.nan, -0.0, 1e-45, np.inf]),
  }


def bits(tree):
  raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return {name: (str(x.dtype), x.shape, np.asarray(raw(x)).tobytes()) for name, x in checkpoint.named(tree).items()}


def save(directory, *steps, **options):
  with Checkpoints(directory, **options) as c:
    for step in steps:
      c.save(step, params(100 + step), state(step), {"loader": [step], "config": {"name": "x"}})


def steps(directory):
  return sorted(int(p.name) for p in pathlib.Path(directory).iterdir() if p.name.isdigit())


def test_restore_is_bit_for_bit(tmp_path):
  save(tmp_path, 1, 2)
  with Checkpoints(tmp_path) as c:
    assert c.latest() == 2
    found, meta = c.restore(state(9))
  assert bits(found) == bits(state(2)) and jax.tree.structure(found) == jax.tree.structure(state(2))
  assert meta == {"loader": [2], "config": {"name": "x"}}
  assert jnp.array_equal(jax.random.normal(found["keys"][1]), jax.random.normal(state(2)["keys"][1]))


def test_saving_survives_donation(tmp_path):
  """The next step overwrites the state's buffers while the save still runs."""
  advance = jax.jit(lambda s: {"w": s["w"] * 0 - 1}, donate_argnums=0)
  big = {"w": jnp.arange(4_000_000, dtype=jnp.float32)}
  want = bits(big)
  with Checkpoints(tmp_path) as c:
    c.save(1, params(), big, {"a": 1})
    for _ in range(3):
      big = advance(big)
    jax.block_until_ready(big)
    c.wait()
    assert bits(c.restore(big)[0]) == want


@pytest.mark.parametrize(
  ("options", "kept"), [({}, [5, 6]), ({"keep_last": 1}, [6]), ({"keep_every": 2}, [2, 4, 5, 6])]
)
def test_keep_policy(tmp_path, options, kept):
  save(tmp_path, *range(1, 7), **options)
  assert steps(tmp_path) == kept


def test_no_step(tmp_path):
  with Checkpoints(tmp_path) as c:
    assert c.latest() is None
    with pytest.raises(UserError, match=f"{tmp_path} holds no complete checkpoint"):
      c.restore(state())


KILLED = """
import os, sys
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity
from tests.io.test_checkpoint import params, state
from sfjax.checkpoint import Checkpoints
c = Checkpoints(sys.argv[1])
meta = {"loader": [1], "config": {"name": "x"}}
c.save(1, params(1), state(1), meta)
c.wait()
async def die(self, *a, **k):
  os._exit(9)
for kind in (atomicity.AtomicRenameTemporaryPath, atomicity.CommitFileTemporaryPath):
  kind.finalize = die
c.save(2, params(2), state(2), meta)
c.wait()
"""


def test_killed_while_saving(tmp_path):
  """The process dies after the arrays are on disk and before the step is made final."""
  done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], capture_output=True, text=True)
  assert done.returncode == 9, done.stderr
  assert len(list(tmp_path.iterdir())) > 1  # something is left over
  with Checkpoints(tmp_path) as c:
    assert c.latest() == 1
    assert bits(c.restore(state())[0]) == bits(state(1))
    c.save(2, params(2), state(2), {"a": 1})  # and it is not in the way
    c.wait()
    assert c.latest() == 2 and bits(c.restore(state())[0]) == bits(state(2))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda s: s | {"half": jnp.zeros((8,), jnp.bfloat16)}, r"half is bfloat16\[7\], this config wants bfloat16\[8\]"),
    (lambda s: s | {"odd": jnp.zeros(4, jnp.bfloat16)}, r"odd is float32\[4\], this config wants bfloat16\[4\]"),
    (lambda s: s | {"more": jnp.zeros(1)}, r"more is absent, this config wants float32\[1\]"),
    (lambda s: {k: v for k, v in s.items() if k != "words"}, r"words is uint32\[2\], this config wants no such array"),
    (lambda s: s | {"params": params(width=6)}, r"params/dit/b is float32\[5\], this config wants float32\[6\]"),
  ],
)
def test_state_of_another_config(tmp_path, change, message):
  save(tmp_path, 1)
  with Checkpoints(tmp_path) as c, pytest.raises(UserError, match=message) as error:
    c.restore(change(state()))
  assert f"{tmp_path}/1 is of another config" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["state/_METADATA", "state/manifest.ocdbt", "state/d/*", "meta/metadata"])
def test_damaged_step(tmp_path, part):
  save(tmp_path, 1)
  for file in (tmp_path / "1").glob(part):
    file.write_bytes(file.read_bytes()[:20])
  with Checkpoints(tmp_path) as c, pytest.raises(UserError, match=f"{tmp_path}/1 is damaged") as error:
    c.restore(state())
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), MemoryError()])
def test_a_full_device_is_not_told_as_damage(tmp_path, monkeypatch, error):
  save(tmp_path, 1)

  def fails(*_, **__):
    raise error

  with Checkpoints(tmp_path) as c, pytest.raises(type(error)):
    monkeypatch.setattr(c._manager, "restore", fails)
    c.restore(state())


def test_a_folder_of_numbered_things_is_no_training_run(tmp_path):
  (tmp_path / "out_60").mkdir()
  with pytest.raises(UserError, match=f"^--checkpoint: {tmp_path} holds no model; want a folder with config.json"):
    load_config(tmp_path)


def test_params_of_a_training_run(tmp_path):
  save(tmp_path / "checkpoints", 1, 2)
  leftover = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
  leftover.mkdir()  # a run that still saves must not be disturbed by a reader
  for folder in (tmp_path, tmp_path / "checkpoints"):
    assert load_config(folder) == {"name": "x"}
    assert bits(load_params(folder, jax.eval_shape(params))) == bits(params(102))
    with pytest.raises(UserError, match=r"dit/b is float32\[5\], this config wants float32\[6\]"):
      load_params(folder, params(width=6))
  assert leftover.is_dir() and steps(tmp_path / "checkpoints") == [1, 2]


def test_arrays_are_bit_for_bit(tmp_path):
  arrays = {name: np.asarray(x) for name, x in checkpoint.named(state() | {"keys": jnp.zeros(1)}).items()}
  save_arrays(tmp_path / "a.npz", arrays)
  assert bits(load_arrays(tmp_path / "a.npz")) == bits(arrays)
  assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_damaged_arrays_are_refused_or_unchanged(tmp_path):
  good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
  arrays = checkpoint.flatten(params())
  save_arrays(good, arrays)
  data, refused = good.read_bytes(), 0
  for i in range(len(data)):
    for damaged in (data[:i], data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]):
      bad.write_bytes(damaged)
      try:
        assert bits(load_arrays(bad)).items() <= bits(arrays).items()  # a lost one is for load_params to miss
      except UserError as error:
        refused += 1
        assert str(error).startswith(f"{bad}: damaged or truncated")
  assert refused > 1.5 * len(data)


def test_arrays_that_cannot_be_written_or_read(tmp_path):
  with pytest.raises(UserError, match="absent/a.npz: cannot be written"):
    save_arrays(tmp_path / "absent" / "a.npz", {})
  with pytest.raises(UserError, match="a.npz: no such file"):
    load_arrays(tmp_path / "a.npz")
  np.save(tmp_path / "a.npy", np.ones(3))
  with pytest.raises(UserError, match="a.npy: damaged"):
    load_arrays(tmp_path / "a.npy")
  with pytest.raises(UserError, match="damaged"):
    load_arrays(tmp_path)


def test_export(tmp_path):
  folder = tmp_path / "model"
  export(folder, params(1), {"name": "old"}, {})
  export(folder, params(2), {"name": "new"}, {"steps": 3})
  assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
  assert sorted(p.name for p in folder.iterdir()) == ["card.json", "config.json", "params.npz"]
  assert load_config(folder) == {"name": "new"} and json.loads((folder / "card.json").read_text()) == {"steps": 3}
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params(2))
  assert bits(load_params(folder, jax.eval_shape(params))) == bits(half)


def test_failed_export_keeps_the_old_folder(tmp_path):
  export(tmp_path / "model", params(1), {"name": "old"}, {})
  with pytest.raises(TypeError):
    export(tmp_path / "model", params(2), {"name": object()}, {})
  assert load_config(tmp_path / "model") == {"name": "old"}


def test_export_is_small(tmp_path):
  big = {"w": np.random.default_rng(0).standard_normal((2000, 2000), np.float32)}
  export(tmp_path / "model", big, {}, {})
  assert sum(p.stat().st_size for p in (tmp_path / "model").iterdir()) < 8e6


def test_model_folders_that_do_not_fit(tmp_path):
  folder = tmp_path / "model"
  with pytest.raises(UserError, match=f"--checkpoint: {folder} is not a folder"):
    load_config(folder)
  folder.mkdir()
  (folder / "run3").mkdir()
  with pytest.raises(UserError, match=f"--checkpoint: {folder} holds no"):
    load_config(folder)
  shutil.rmtree(folder)
  export(folder, params(), {"name": "x"}, {})
  for like, message in (
    (params(width=6), r"dit/b is \[5\], this config wants \[6\]"),
    (params() | {"text": jnp.ones(2)}, r"text is absent, this config wants \[2\]"),
    ({"dit": {"w": params()["dit"]["w"]}}, r"dit/b is \[5\], this config wants no such array"),
  ):
    with pytest.raises(UserError, match=f"--checkpoint: {folder}: {message}"):
      load_params(folder, like)
  for text in ('{"name"', "[]", "\x00"):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged"):
      load_config(folder)
  (folder / "params.npz").unlink()
  with pytest.raises(UserError, match="params.npz: no such file"):
    load_params(folder, params())
