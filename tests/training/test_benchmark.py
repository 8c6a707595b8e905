"""`python -m benchmarks.distill` on a CPU at toy size: what it writes, and the arithmetic of what follows from the parts."""

import json

import numpy as np
import pytest

from benchmarks import distill

TOY = (
  "--config.model.dim=32 --config.model.layers=1 --config.model.heads=2 --config.model.ffn_dim=32 --config.model.text_dim=16 "
  "--config.model.text_len=8 --config.model.freq_dim=16 --config.model.latent_size=(8,12) --config.model.tile=(3,2,2) "
  "--config.model.dtype=float32 --config.memory.window=2 --config.memory.persistent=4 --config.memory.top_k=0.5 "
  "--config.sampler.steps=2"
).split()

TWICE = {"step", "gradient_dense"}  # timed at the first exit and at the last
PARTS = TWICE | {"fake", "critic"}  # those that most of the code is in: compiling all takes a minute more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("distill")
  distill.main([*TOY, "--runs", "1", "--out", str(out), "--parts", *PARTS])
  return out


def read(folder) -> dict:
  return json.loads((folder / "distill.json").read_text())


def test_what_is_written(folder):
  record = read(folder)
  assert record.keys() >= {"command", "config", "versions", "device", "flags", "protocol"}
  assert record["config"]["distill"]["teacher"] == "" and record["config"]["model"]["dim"] == 32
  assert set(record["parts"]) == PARTS
  for name, row in record["parts"].items():
    assert set(row["seconds"]) == ({"first", "last"} if name in TWICE else {"all"})
    np.testing.assert_allclose(row["s"], np.mean([*row["seconds"].values()]))
    assert min(row["s"], row["compile_s"], row["bytes"]["held"], row["bytes"]["workspace"]) > 0
    assert row.get("not_finite") == (0 if name == "step" else None)
  s = {name: row["s"] for name, row in record["parts"].items()}
  assert (
    record["summary"] == distill.summary(record["parts"]) == {"step_of_5_critic_updates_s": s["step"] + 4 * s["critic"]}
  )


def test_a_part_is_measured_again_and_others_stay(folder):
  before = read(folder)["parts"]
  distill.main([*TOY, "--runs", "1", "--out", str(folder), "--parts", "fake"])
  after = read(folder)["parts"]
  assert after.pop("fake") != before.pop("fake") and after == before


def test_what_follows_from_the_parts():
  seconds = dict(step=7, rollout=1, gradient=2.5, real=1, fake=0.5, critic=2, gradient_dense=3.75)
  rows = {name: {"s": s} for name, s in seconds.items()} | {
    "teacher_forcing": {"s": 2},
    "teacher_forcing_dense": {"s": 3},
  }
  found = distill.summary(rows)
  assert found.pop("step_of_5_critic_updates_s") == 15
  assert found.pop("rollout_dense_over_sparse") == 1.5 and found.pop("teacher_forcing_dense_over_sparse") == 1.5
  share = {name: 7 * x for name, x in found.pop("share_of_step").items()}
  want = dict(rollout=1, real=1, fake=0.5, critic=2, exit_steps_with_backward=1.5, optimizer_average_and_rest=1)
  assert share == pytest.approx(want) and not found
  rows |= {"gradient_dense": {"skipped": "why"}, "critic": {"skipped": "why"}}
  assert distill.summary(rows) == {"teacher_forcing_dense_over_sparse": 1.5}
  assert distill.line("critic", rows["critic"]) == "| critic | why | | | | | |"


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ("--runs 0", "--runs: 0; want 1 or more"),
    ("--parts stp", "--parts: invalid choice: 'stp'"),
    ("--config absent.py", "--config: absent.py is not a python file"),
    ("--config.model.dimm=3", "did you mean --config.model.dim?"),
  ],
)
def test_what_is_refused(flags, says, tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    distill.main([*flags.split(), "--out", str(tmp_path)])
  assert stop.value.code == 2 and says in capsys.readouterr().err
