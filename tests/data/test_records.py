"""Shards that several processes write at once come back as they were made."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sfjax.data import records
from sfjax.errors import UserError

CAPTIONS = [f"clip {i} é" for i in range(21)]
X = np.random.default_rng(0).normal(size=(21, 2, 3)).astype(np.float16)


def write(path, part=(0, 1), make=lambda i: {"x": X[i]}, **card):
  records.write(str(path), "things", {"seed": 1} | card, CAPTIONS, 2, part, make)


def test_parts_at_once(tmp_path):
  with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda i: write(tmp_path, (i, 8)), range(8)))
  read = records.Records(str(tmp_path), "things", "sfjax.things")
  assert len(read) == 21 and read.captions == CAPTIONS and read.card["seed"] == 1
  for i in range(21):
    np.testing.assert_array_equal(read[i]["x"], X[i])
    assert read[i]["caption"] == CAPTIONS[i]
  assert sorted(f.name for f in tmp_path.iterdir()) == [f"things-{i:05d}.array_record" for i in range(11)] + [
    "things.json"
  ]


def test_a_part_has_its_shards_alone():
  assert [list(r) for r in records.shards(7, 2, (1, 3))] == [[2, 3]]
  assert sorted(i for p in range(3) for r in records.shards(7, 2, (p, 3)) for i in r) == list(range(7))


def test_what_was_cut_off_is_made_again_and_no_more(tmp_path):
  def broken(i):
    if i[0] == 4:
      raise KeyboardInterrupt
    return {"x": X[i]}

  with pytest.raises(KeyboardInterrupt):
    write(tmp_path, make=broken)
  with pytest.raises(UserError, match="lacks 9 of 11 shards, first things-00002.array_record; the same sfjax.things"):
    records.Records(str(tmp_path), "things", "sfjax.things")
  made = []
  write(tmp_path, make=lambda i: made.append(int(i[0])) or {"x": X[i]})
  assert made == list(range(4, 21, 2))
  with pytest.raises(UserError, match="--out: .* holds things of other flags, see things.json"):
    write(tmp_path, seed=2)


def test_a_card_of_before_is_refused(tmp_path):
  (tmp_path / "things.json").write_text(json.dumps({"shards": 1}))
  with pytest.raises(UserError, match="was written by an earlier sfjax.things; its command into a new folder"):
    records.Records(str(tmp_path), "things", "sfjax.things")


def test_a_damaged_card_is_named_and_can_be_made_again(tmp_path):
  write(tmp_path)
  file = tmp_path / "things.json"
  whole = file.read_text()
  for text in (
    whole[:40],
    "",
    "[1]",
    '{"captions": []}',
    '{"shards": "3", "captions": []}',
    '{"shards": 3, "captions": 1}',
  ):
    file.write_text(text)
    with pytest.raises(
      UserError, match="things.json is damaged; remove it and run the same sfjax.things command again"
    ):
      records.Records(str(tmp_path), "things", "sfjax.things")
    with pytest.raises(UserError, match="--out: .*things.json is damaged; remove it and run the same command again"):
      write(tmp_path)
  file.unlink()
  write(tmp_path, make=None)
  assert file.read_text() == whole


@pytest.mark.parametrize("size", [0, 100, 70_000, -1])
def test_a_shard_cut_short_is_named_and_can_be_made_again(size, tmp_path):
  write(tmp_path)
  file = tmp_path / "things-00003.array_record"
  whole = file.read_bytes()
  file.write_bytes(whole[:size])
  with pytest.raises(
    UserError, match="path: .*things-00003.array_record is damaged; remove it and run the same sfjax.th"
  ):
    records.Records(str(tmp_path), "things", "sfjax.things")
  file.unlink()
  write(tmp_path)
  assert len(records.Records(str(tmp_path), "things", "sfjax.things")) == 21


def test_a_damaged_clip_names_its_shard(tmp_path):
  write(tmp_path)
  file = tmp_path / "things-00003.array_record"
  whole = file.read_bytes()
  file.write_bytes(whole.replace(X[6].tobytes(), bytes(12)))
  read = records.Records(str(tmp_path), "things", "sfjax.things")
  np.testing.assert_array_equal(read[5]["x"], X[5])
  with pytest.raises(UserError, match="things-00003.array_record is damaged"):
    read[6]


@pytest.mark.parametrize("text", ["", "1", "1/1", "-1/2", "a/b", "0/0"])
def test_a_part_that_is_none(text):
  with pytest.raises(UserError, match="--part: .*; want I/N, I from 0 to N - 1"):
    records.part(text)
