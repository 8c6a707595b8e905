"""`python -m benchmarks.pbsa`: the command on a CPU, what it counts, and that what it times on a GPU lowers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pbsa as benchmark
from pallas_kernels.pbsa import mosaic_sm90, validate_lists
from pallas_kernels.pbsa.timing import random_lists


@pytest.fixture(scope="module")
def record(tmp_path_factory):
  out = tmp_path_factory.mktemp("pbsa")
  benchmark.main(["--shape", "tiny", "--runs", "3", "--peak_gbps", "1000", "--out", str(out)])
  assert (out / "pbsa.png").read_bytes().startswith(b"\x89PNG")
  return json.loads((out / "pbsa.json").read_text())


def test_record(record):
  assert record.keys() >= {
    "command",
    "config",
    "versions",
    "device",
    "flags",
    "rows",
    "ratios",
    "libraries",
    "protocol",
  }
  assert record["config"]["tiny"]["blocks"] == 2 + 2 * 4
  timed = {(r["what"], r["pass"]): r for r in record["rows"] if "ms" in r}
  assert set(timed) >= {("pbsa xla", p) for p in benchmark.PASSES} | {("routing", "forward")}
  for row in timed.values():
    assert min(row["ms"], *row["ms_p10_p90"], row["calls"], row["flops"], row["bytes"], row["roofline_ms"]) > 0
    np.testing.assert_allclose(row["tflops"] * row["ms"] * 1e9, row["flops"])
    np.testing.assert_allclose(row["roofline_ms"], max(row["flops"] / 790e9, row["bytes"] / 1e9))


def test_skipped_rows_say_why(record):
  skipped = {r["what"]: r["error"] for r in record["rows"] if "error" in r}
  assert "NVIDIA GPU" in skipped["pbsa cudnn"] and "head dim 16" in skipped["pbsa mosaic_sm90"]
  assert "--fastvideo" in skipped["vsa triton"]


def test_counted_work(record):
  rows = {(r["what"], r["pass"]): r for r in record["rows"]}
  forward = 4 * 2 * (2 * 128) * (2 + 4) * 48 * 16  # 2 heads, 2 tiles, P's 2 blocks and 4 listed, 48 valid, H 16
  for name, flops, moved in (("forward", 1, 1), ("backward", 2.5, 2), ("both", 3.5, 3)):
    row = rows["pbsa xla", name]
    assert row["flops"] == forward * flops and row["slot_flops"] == forward * flops * 64 / 48
    assert row["bytes"] == moved * 2 * 2 * 16 * 2 * (256 + 640)  # two arrays each of 256 and 640 slots, 2 bytes
  scores = 2 * 2 * 2 * 8 * 16  # 2 heads, 2 tiles, 8 blocks in the window
  assert rows["routing", "forward"]["flops"] == scores


@pytest.mark.parametrize("name", [n for n in benchmark.SHAPES if n != "long"])
def test_lists(name):
  shape = benchmark.SHAPES[name]
  p = benchmark.problem(dataclasses.replace(shape, head_dim=1), 0)
  ids, counts = p.ids, p.counts
  validate_lists(ids, counts, shape.blocks * 64)
  assert ids.min() >= shape.prefix and counts.mean() == shape.listed and counts.min() < counts.max() == ids.shape[-1]


def test_read_map():
  shape = benchmark.SHAPES["tiny"]
  p = benchmark.problem(shape, 0)
  for at in np.ndindex(p.counts.shape):
    assert list(np.flatnonzero(p.read[at])) == [0, 1, *p.ids[at][: p.counts[at]]]


def test_shapes_of_the_paper_and_production():
  production, paper = benchmark.SHAPES["production"], benchmark.SHAPES["paper 6.25%"]
  assert (production.q, production.kv) == ((1, 4992, 12, 128), (1, 294 * 64, 12, 128))
  assert (production.prefix, production.listed, production.valid) == (60, 59, 60)
  assert production.kv_short is None and production.pairs == 12 * 4992 * 119 * 60
  packed = benchmark.SHAPES["packed"]
  assert (packed.q, packed.kv) == ((1, 37 * 128, 12, 128), (1, 278 * 64, 12, 128))
  assert (packed.prefix, packed.listed, packed.valid) == (56, 56, 64)
  assert (packed.sizes == 8).sum() == 3 and packed.sizes.sum() == 56 * 64 + 3 * 4680
  assert packed.pairs == round(12 * 37 * 128 * (56 * 64 + 56 * 4680 / 74))
  assert (paper.rows, paper.blocks * 64, paper.prefix * 64, paper.listed) == (4608, 65536, 4096, 60)


@pytest.mark.parametrize("name", ["production", "packed"])
def test_mosaic_lowers_at_production_size(monkeypatch, name):
  monkeypatch.setattr(mosaic_sm90, "unsupported", lambda *_: None)
  shape = benchmark.SHAPES[name]
  where = shape.batch, shape.heads, shape.tiles
  lists = random_lists(np.random.default_rng(0), where, shape.blocks, shape.prefix, shape.listed)
  q, kv = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (shape.q, shape.kv))
  group = benchmark.pbsa_group(shape, benchmark.Problem((q, kv, kv), q, *lists, None), "mosaic_sm90")
  for name, kernels in (("forward", 2), ("both", 5)):  # with those that join pieces
    call = group.prepare[name]()
    text = call.func.trace(*call.args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == kernels


def test_wrong_flags_end_with_a_line(tmp_path, capsys):
  for argv, match in (
    (["--shape", "huge"], "--shape"),
    (["--shape", "tiny", "--runs", "0"], "--runs: 0"),
    (["--shape", "production"], "no NVIDIA GPU"),
  ):
    with pytest.raises(SystemExit) as stop:
      benchmark.main([*argv, "--out", str(tmp_path)])
    assert stop.value.code == 2 and match in capsys.readouterr().err
