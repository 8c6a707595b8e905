"""Records: complete, JSON-able, renamed into place."""

import errno
import json
import os

import jax
import pytest

from sfjax import runlog
from sfjax.errors import UserError


def test_record():
  record = json.loads(json.dumps(runlog.run_record({"a": 1}, seed=3, peak_memory=runlog.peak_memory())))
  assert record["config"] == {"a": 1} and record["seed"] == 3
  assert record["versions"]["jax"] == jax.__version__ and record["versions"]["sfjax"]
  assert record["device"] == {"kind": "cpu", "platform": "cpu", "count": jax.device_count()}
  assert record["peak_memory"]["host"] > 50e6  # bytes, not kilobytes


def test_commit_is_ours_or_none(tmp_path, monkeypatch):
  package = tmp_path / "site-packages" / "sfjax"
  package.mkdir(parents=True)
  os.system(f"cd {tmp_path} && git init -q . && git -c user.name=a -c user.email=b commit -q --allow-empty -m x")
  monkeypatch.setattr(runlog, "__file__", str(package / "runlog.py"))
  assert runlog._commit() is None


def test_json_is_atomic(tmp_path):
  path = tmp_path / "run.json"
  path.write_text("old")
  with path.open() as reader:
    runlog.write_json_atomic(path, {"a": 1})
    assert reader.read() == "old"  # who reads meanwhile sees a whole file
  with pytest.raises(TypeError):
    runlog.write_json_atomic(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["run.json"]


def test_unwritable(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    runlog.write_json_atomic(tmp_path / "file" / "run.json", {})
  with pytest.raises(UserError, match="cannot be written"):
    runlog.write_json_atomic(tmp_path, {})
  with pytest.raises(UserError, match=f"--out: {tmp_path}/file/sub is not a writable folder"):
    runlog.make_folder(tmp_path / "file" / "sub", "--out")
  assert runlog.make_folder(tmp_path / "a" / "b", "--out").is_dir()


def test_only_a_full_disk_is_blamed_on_the_file(tmp_path):
  with pytest.raises(UserError, match="x: cannot be written"), runlog.replacing(tmp_path / "x"):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with pytest.raises(FileNotFoundError), runlog.replacing(tmp_path / "x"):
    open(tmp_path / "another file")
  assert os.listdir(tmp_path) == []


def test_latency():
  assert runlog.latency([9.0, 1.0, 2.0, 3.0]) == {"count": 4, "first": 9.0, "p50": 2.0, "p95": 2.9}
  assert runlog.latency([9.0]) == {"count": 1, "first": 9.0, "p50": 9.0, "p95": 9.0}
