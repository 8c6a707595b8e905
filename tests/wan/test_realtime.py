"""`python -m benchmarks.realtime` at toy size: what it times and what it reports."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import realtime, self_forcing_peer
from benchmarks.realtime_report import line, peer_line
from sfjax.config import Config, load_config, to_dataclass
from sfjax.parts import around

TINY = [
  *("dim=64 layers=2 heads=2 ffn_dim=96 text_dim=32 text_len=48 freq_dim=32".split()),
  "latent_size=(8,12)", "tile=(3,2,2)", "block_tokens=13", "dtype=float32",
]  # fmt: skip


def test_a_row_for_every_attention_and_length(tmp_path, capsys):
  flags = [f"--config.model.{x}" for x in TINY]
  flags += ["--config.memory.window=2", "--config.memory.persistent=4", "--config.sampler.steps=1"]
  flags += ["--vae_dim", "8", "--clip", "2", "--out", str(tmp_path), "--self_forcing", str(tmp_path)]
  realtime.main([*flags, "--attention", "sparse", "full", "--seconds", "3", "1"])
  record = json.loads((tmp_path / "realtime.json").read_text())
  runs = {r["attention"]: r for r in record["runs"]}
  rows = {(r["attention"], r["seconds"]): r for r in record["rows"]}
  assert {r["passes"] for r in record["runs"]} == {2}  # a step and the commit
  assert list(runs) == ["sparse", "full"] and list(rows) == [(a, s) for a in runs for s in (1, 3)]
  for (attention, seconds), row in rows.items():
    run = runs[attention]
    times = np.array(run["chunk_times_s"])
    assert times.shape == (5, 2) and run["frames"] == 57  # the fifth chunk has the 48th frame
    assert (times[:, 0] < times[:, 1]).all()
    chunks = 5 if seconds == 3 else 2
    assert row["chunks"] == chunks and row["measured"]
    full = 3 if attention == "sparse" and chunks == 5 else 1  # a window of 2, and 4 of a chunk's 5 whole blocks
    steady = np.median(times[full:chunks], 0)
    np.testing.assert_allclose([row["fps_denoiser"], row["fps_end_to_end"]], 12 / steady)
  for run in runs.values():
    assert run["kv_bytes"]["predicted"] == run["kv_bytes"]["measured"] > 0
    assert run["first_frames_s"] > run["chunk_times_s"][0][1] * 0.5
    told = run["device_bytes"]
    assert told["predicted"]["total"] == told["measured"]["total"] + told["predicted"]["in_flight"]
    assert told["live"] >= told["measured"]["total"]
    assert run["peak_memory"]["predicted"] == told["predicted"]["total"] + max(told["workspace"].values())
  assert rows["full", 3]["kv_bytes"] == runs["full"]["kv_bytes"]["measured"] > 1.8 * rows["sparse", 3]["kv_bytes"]
  assert rows["full", 1]["kv_bytes"] * 5 == rows["full", 3]["kv_bytes"] * 2  # what a video of that length takes
  assert record["decoder"]["clip"]["frames"] == 5 and record["decoder"]["chunk"]["frames"] == 12
  out = capsys.readouterr().out
  assert "| sparse | 3 |" in out and "is not a clone of guandeh17/Self-Forcing" in record["self_forcing"]["skipped"]
  assert "Self-Forcing skipped: FileNotFoundError" in out
  assert Image.open(tmp_path / "realtime.png").size == (1500, 600)


def test_a_buffer_that_two_arrays_share_is_held_once():
  device = jax.local_devices()[0]
  before = realtime.held_by(device)
  x = jax.device_put(np.ones(100_000, np.float32), device)
  shard = x.addressable_data(0)
  assert realtime.held_by(device) - before == x.nbytes == shard.nbytes


def test_streams_are_made_together_with_the_samplers_options(tmp_path, capsys):
  flags = [f"--config.model.{x}" for x in TINY]
  flags += ["--config.memory.window=2", "--config.memory.persistent=4", "--config.sampler.steps=2"]
  flags += (
    "--vae_dim 8 --clip 0 --attention sparse --routing chunk --commit last --slots float8 --linear float8".split()
  )
  flags += "--seconds 2 --streams 2 --out".split()
  realtime.main([*flags, str(tmp_path)])
  record = json.loads((tmp_path / "realtime.json").read_text())
  (run,), (row,) = record["runs"], record["rows"]
  assert (run["routing"], run["commit"], run["passes"]) == ("chunk", "last", 2)
  assert "| sparse, routing chunk, commit last, slots float8, linear float8 | 2 |" in capsys.readouterr().out
  steady = np.median(np.array(run["chunk_times_s"])[1 if row["chunks"] <= 3 else 3 :], 0)
  np.testing.assert_allclose([row["fps_denoiser"], row["fps_end_to_end"]], 2 * 12 / steady)
  assert run["kv_bytes"]["predicted"] == run["kv_bytes"]["measured"] == row["kv_bytes"]
  told = run["device_bytes"]
  assert told["predicted"]["total"] == told["measured"]["total"] + told["predicted"]["in_flight"]


def test_the_longest_that_fits(monkeypatch):
  config = to_dataclass(Config, load_config("configs/wan_1_3b.py"))
  sizes = around(config)[1]
  parts = SimpleNamespace(config=config, around=sizes, codec=sizes.codec, mesh=None, decoder=None)
  total = lambda n: realtime.predict(parts, config.memory.of_window(n))["total"]

  def device(limit):
    monkeypatch.setattr(
      jax, "devices", lambda: [SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})]
    )

  for limit, longest in (
    (total(40), 40),
    (total(41) - 1, 40),
    (total(40) + 7, 40),
    (total(1) - 1, 0),
    (total(300), 81),
  ):
    device(limit + 5)
    assert realtime.fitting(parts, "full", 81, spare=5) == longest
  device(None)  # it does not tell
  assert realtime.fitting(parts, "full", 10**6, spare=0) == 10**6
  device(total(10))
  monkeypatch.setattr(
    realtime, "measure", lambda parts, memory, chunks, streams: {"chunk_times_s": np.ones((chunks, 2)).tolist()}
  )
  run, rows = realtime.rows_of(parts, "full", [5, 60], spare=0)
  assert [(r["chunks"], r["measured"]) for r in rows] == [(7, True), (10, True), (81, False)]
  assert len(run["chunk_times_s"]) == 10 and rows[2]["total_bytes"] == total(81)
  assert "| full | 60 | does not fit |" in line(rows[2], run)

  def no_room_for_ten(parts, memory, chunks, streams):
    if chunks == 10:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return {"chunk_times_s": np.ones((chunks, 2)).tolist()}

  monkeypatch.setattr(realtime, "measure", no_room_for_ten)
  _, rows = realtime.rows_of(parts, "full", [5, 60], spare=0)
  assert [(r["chunks"], r["measured"]) for r in rows] == [(7, True), (8, True), (81, False)]


def test_without_pytorch_the_peer_is_skipped(tmp_path, monkeypatch, capsys):
  (tmp_path / "pipeline").mkdir()
  (tmp_path / "pipeline" / "causal_inference.py").write_text("raise ImportError('broken')")
  monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
  self_forcing_peer.main(["--clone", str(tmp_path)])
  assert json.loads(capsys.readouterr().out)["skipped"].startswith("ModuleNotFoundError: ")


def test_a_row_of_the_peer():
  row = {
    "cache": "cache 21",
    "frames": 81,
    "chunk_times_s": [0.2, 0.3, 0.5],
    "fps_denoiser": 24.0,
    "fps_end_to_end": 18.5,
  }
  text = peer_line(row | {"kv_bytes": 6_040_000_000, "peak_memory": None}, 16.0)
  assert text.startswith("| Self-Forcing, cache 21 | 5.06 | 24.0 | 18.5 | 300 / 500 |") and "| 6.04 |" in text


def test_wrong_flags_end_in_a_line(capsys):
  with pytest.raises(SystemExit) as e:
    realtime.main(["--seconds", "5", "0"])
  assert e.value.code == 2 and "--seconds: 0; want more than 0" in capsys.readouterr().err
  with pytest.raises(SystemExit) as e:
    realtime.main(["--streams", "0"])
  assert e.value.code == 2 and "--streams: 0; want 1 or more" in capsys.readouterr().err
