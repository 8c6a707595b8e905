"""`python -m benchmarks.realtime` at toy size: what it times and what it reports."""

import json

import numpy as np
import pytest

from benchmarks import realtime

TINY = [
  *("dim=64 layers=2 heads=2 ffn_dim=96 text_dim=32 text_len=48 freq_dim=32".split()),
  "latent_size=(8,12)", "tile=(3,2,2)", "dtype=float32",
]  # fmt: skip


def test_a_row_for_every_attention(tmp_path, capsys):
  flags = [f"--config.model.{x}" for x in TINY]
  flags += ["--config.memory.window=2", "--config.memory.persistent=4", "--config.sampler.steps=1"]
  realtime.main(
    [*flags, "--attention", "sparse", "full", "--seconds", "3", "--vae_dim", "8", "--clip", "2", "--out", str(tmp_path)]
  )
  record = json.loads((tmp_path / "realtime.json").read_text())
  assert [r["attention"] for r in record["rows"]] == ["sparse", "full"]
  for row in record["rows"]:
    times = np.array(row["chunk_times_s"])
    assert times.shape == (5, 2)  # 48 frames: 9, then four chunks of 12, the last cut
    assert (times[:, 0] < times[:, 1]).all()
    assert row["kv_bytes"]["predicted"] == row["kv_bytes"]["measured"] > 0
    steady = np.median(
      times[3 if row["attention"] == "sparse" else 1 :], 0
    )  # a window of 2, and 4 of a chunk's 6 blocks
    np.testing.assert_allclose([row["fps_denoiser"], row["fps_end_to_end"]], 12 / steady)
    assert row["first_frames_s"] > times[0, 1] * 0.5
  sparse, full = (row["kv_bytes"]["measured"] for row in record["rows"])
  assert full > 1.8 * sparse  # 5 chunks of 6 blocks; 2 and 4 blocks
  assert record["decoder"]["clip"]["frames"] == 5 and record["decoder"]["chunk"]["frames"] == 12
  assert "| sparse |" in capsys.readouterr().out


def test_wrong_flags_end_in_a_line(capsys):
  with pytest.raises(SystemExit) as e:
    realtime.main(["--seconds", "0"])
  assert e.value.code == 2 and "--seconds: 0.0; want more than 0" in capsys.readouterr().err
