"""`python -m benchmarks.gelu_linear` at toy size."""

import json

import pytest

from benchmarks import gelu_linear

SIZES = ("dim=64", "heads=2", "ffn_dim=96", "latent_size=(8,12)", "tile=(3,2,1)", "block_tokens=13")


def test_the_command(tmp_path, capsys):
  flags = [f"--config.model.{x}" for x in SIZES]
  gelu_linear.main([*flags, "--layers", "2", "--turns", "1", "--runs", "1", "--out", str(tmp_path)])
  said = capsys.readouterr().out
  assert "without mosaic_sm90: implementation: mosaic_sm90 wants a Hopper GPU" in said and "[72,64] x [64,96]" in said
  record = json.loads((tmp_path / "gelu_linear.json").read_text())
  assert 0 < record["xla"]["error"] < 2**-7 and record["product"]["ms"][0] > 0


def test_wrong_flags(capsys):
  with pytest.raises(SystemExit):
    gelu_linear.main(["--runs", "0"])
  assert "--runs: 0; want 1..1000" in capsys.readouterr().err
