"""The loader: the stream is a function of (seed, step), whatever interrupts or divides it."""

import numpy as np
import pytest

from sfjax.data.digits import DigitsConfig, render
from sfjax.data.loader import DigitsSource, make_loader

DIGITS = DigitsSource(DigitsConfig(chunks=5), DigitsConfig("memory", chunks=5), p_memory=0.5)


class Numbers:
  """Clip i is the number i."""

  def __init__(self, n: int):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, index):
    return {"frames": np.full((1, 1, 1, 3), index, np.uint8), "caption": str(index)}


def take(loader, n):
  return [next(loader) for _ in range(n)]


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch["caption"] == other["caption"]
    np.testing.assert_array_equal(batch["frames"], other["frames"])


def test_batches():
  batch = next(make_loader(DIGITS, 3, seed=0))
  assert batch["frames"].shape == (3, 57, 64, 64, 3) and batch["frames"].dtype == np.uint8
  assert len(batch["caption"]) == 3 and all(isinstance(c, str) for c in batch["caption"])


def test_a_later_start_goes_on_bit_for_bit():
  batches = take(make_loader(DIGITS, 2, seed=1), 7)
  assert_same(take(make_loader(DIGITS, 2, seed=1, threads=1, start=3), 4), batches[3:])
  epochs = take(make_loader(Numbers(4), 3, seed=1), 5)
  assert_same(take(make_loader(Numbers(4), 3, seed=1, start=4), 1), epochs[4:])  # in its third epoch


def test_seeds_order_the_clips():
  first, again, other = (take(make_loader(DIGITS, 2, seed=s), 2) for s in (0, 0, 1))
  assert_same(first, again)
  assert any((a["frames"] != b["frames"]).any() for a, b in zip(first, other, strict=True))


def test_shards_interleave_to_the_whole():
  whole = take(make_loader(DIGITS, 4, seed=3), 3)
  shards = [take(make_loader(DIGITS, 2, seed=3, process_index=i, process_count=2), 3) for i in range(2)]
  for step, batch in enumerate(whole):
    for i in range(2):
      np.testing.assert_array_equal(batch["frames"][i::2], shards[i][step]["frames"])
      assert batch["caption"][i::2] == shards[i][step]["caption"]


@pytest.mark.parametrize("n, batch", [(12, 4), (7, 3)])
def test_finite_sources_are_shuffled_anew_each_epoch(n, batch):
  loader = make_loader(Numbers(n), batch, seed=0)
  order = [int(c) for b in take(loader, 3 * n // batch) for c in b["caption"]]
  epochs = [order[i : i + n] for i in range(0, 3 * n, n)]
  assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_shards_of_a_finite_source_cover_it():
  parts = [make_loader(Numbers(10), 5, seed=0, process_index=i, process_count=2) for i in range(2)]
  assert sorted(int(c) for part in parts for c in next(part)["caption"]) == list(range(10))


def test_digits_source():
  config = DigitsConfig(chunks=1)
  source = DigitsSource(config, seed=4)
  clip = render(config, 4, 10**9)
  np.testing.assert_array_equal(source[10**9]["frames"], clip.frames)
  assert source[10**9]["caption"] == clip.caption and len(source) > 10**9
  with pytest.raises(ValueError, match="p_memory: 0.5"):
    DigitsSource(config, p_memory=0.5)
  with pytest.raises(ValueError, match="chunks: "):
    DigitsSource(config, DigitsConfig("memory", chunks=7), p_memory=0.5)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(batch_size=0), "batch_size: 0"),
    (dict(threads=0), "threads: 0"),
    (dict(start=-1), "start: -1"),
    (dict(process_index=2, process_count=2), r"process_index: 2 is not accepted; 0..1"),
  ],
)
def test_errors_name_the_argument(change, message):
  with pytest.raises(ValueError, match=message):
    make_loader(**(dict(source=DIGITS, batch_size=2, seed=0) | change))
