"""Metrics: one line each, and a resumed run's file that reads like an unbroken one."""

import json

import numpy as np
import pytest

from sfjax.metrics import MetricWriter


def record(workdir, steps, start=0):
  with MetricWriter(workdir, 10, start) as writer:
    for step in steps:
      writer.advance()
      writer.write(step, {"loss": 1 / step, "rate": np.float32(step)})


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines(tmp_path, capsys):
  record(tmp_path, [1, 2])
  assert lines(tmp_path) == [{"step": 1, "loss": 1.0, "rate": 1.0}, {"step": 2, "loss": 0.5, "rate": 2.0}]
  out, err = capsys.readouterr()
  assert out == "step 1  loss 1  rate 1\nstep 2  loss 0.5  rate 2\n"
  assert err == ""  # no terminal, no bar


def test_each_line_is_on_disk_at_once(tmp_path):
  with MetricWriter(tmp_path, 10) as writer:
    writer.write(1, {"loss": 0.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.0}]


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', "garbage\n", "\0\0\0\n", '{"loss": 1.0}\n', "[]\n"])
def test_resume(tmp_path, tail):
  whole = tmp_path / "whole"
  broken = tmp_path / "broken"
  for workdir in (whole, broken):
    workdir.mkdir()
  record(whole, [1, 2, 3, 4, 5])
  record(broken, [1, 2, 3, 4])
  with (broken / "metrics.jsonl").open("a") as f:
    f.write(tail)
  record(broken, [3, 4, 5], start=2)  # the checkpoint was older than the log
  assert (broken / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_tensorboard(tmp_path):
  record(tmp_path, [1, 2])
  files = list((tmp_path / "tb").glob("events.out.tfevents.*"))
  assert len(files) == 1
  data = files[0].read_bytes()
  assert data.count(b"loss") == 2 and data.count(b"rate") == 2
