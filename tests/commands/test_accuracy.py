"""`python -m benchmarks.accuracy` at toy size, on a CPU: no kernels there, so both are the same, and err as 16 bit does."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accuracy

SIZES = "dim=64 layers=2 heads=2 ffn_dim=96 text_dim=32 text_len=48 freq_dim=32 latent_size=(8,12) tile=(3,2,1)".split()


def run(tmp_path, dtype):
  flags = [f"--config.model.{x}" for x in [*SIZES, "block_tokens=13", f"dtype={dtype}"]]
  flags += ["--config.memory.window=2", "--config.memory.persistent=4", "--config.sampler.steps=2"]
  accuracy.main([*flags, "--layers", "2", "--chunks", "4", "--out", str(tmp_path)])
  return json.loads((tmp_path / "accuracy.json").read_text())


def test_sixteen_bit_errs_by_its_rounding(tmp_path):
  found = run(tmp_path, "bfloat16")
  assert found["kernels"] == found["plain"]
  eps = float(jnp.finfo(jnp.bfloat16).eps)
  assert len(found["kernels"]) == 4 and all(eps / 8 < x < 4 * eps for x in found["kernels"])


def test_float32_is_its_own_measure(tmp_path):
  np.testing.assert_allclose(run(tmp_path, "float32")["plain"], 0, atol=1e-5)


def test_wrong_flags(capsys):
  for flags, line in (
    (["--layers", "31"], "--layers: 31; want 1..30"),
    (["--config.sampler.guidance=2"], "--config: sampler of kind few_step, guidance 2.0"),
  ):
    with pytest.raises(SystemExit):
      accuracy.main(flags)
    assert line in capsys.readouterr().err
