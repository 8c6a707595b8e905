"""Digits: repeatable clips, ground truth that agrees with the pixels, and hidden frames that tell nothing."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfjax.data import digits, handwriting
from sfjax.data.digits import (
  COLOURS,
  WORDS,
  DigitsConfig,
  chunk_of_frame,
  chunks_for,
  first_frame,
  frames_of_chunks,
  render,
  render_mixed,
)

PROMPT = DigitsConfig("prompt", chunks=3)
MEMORY = DigitsConfig("memory", chunks=9)


def digest(clip) -> str:
  h = hashlib.sha256(clip.frames.tobytes() + clip.caption.encode())
  for field in (clip.labels, clip.boxes, clip.visibility, clip.hidden):
    h.update(field.tobytes())
  return h.hexdigest()


# --- the time grid


def test_time_grid():
  assert [frames_of_chunks(n) for n in (1, 7, 14)] == [9, 81, 165]
  chunks = [chunk_of_frame(f) for f in range(frames_of_chunks(14))]
  assert chunks == sorted(chunks) and np.bincount(chunks).tolist() == [9] + [12] * 13
  assert all(chunks.index(c) == first_frame(c) for c in range(14))


# --- handwriting


def test_handwriting_splits_are_disjoint_tails():
  from sklearn.datasets import load_digits

  (train, train_labels), (test, test_labels) = handwriting.load("train"), handwriting.load("test")
  whole = load_digits()
  assert len(train) + len(test) == len(whole.target) == 1797
  for label in range(10):
    both = np.concatenate([train[train_labels == label], test[test_labels == label]])
    np.testing.assert_array_equal(both * 16, whole.images[whole.target == label])
    assert abs((test_labels == label).sum() / len(both) - 0.2) < 0.005
  assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_glyph_is_an_alpha_mask():
  mask = handwriting.glyph("test", 3, 20)
  assert mask.shape == (20, 20) and mask.dtype == np.float32 and mask.min() == 0 and mask.max() == 1
  assert handwriting.glyph("test", 3, 20) is mask and not mask.flags.writeable
  with pytest.raises(ValueError, match="split: 'val'"):
    handwriting.load("val")


# --- repeatable


def test_same_seed_and_index_give_the_same_clip_in_any_process():
  here = [digest(render(c, 3, i)) for c in (PROMPT, MEMORY) for i in (5, 1)]
  script = (
    "from tests.data.test_digits import *\nprint(*[digest(render(c, 3, i)) for i in (1, 5) for c in (MEMORY, PROMPT)])"
  )
  memory1, prompt1, memory5, prompt5 = subprocess.check_output([sys.executable, "-c", script], text=True).split()
  assert here == [prompt5, prompt1, memory5, memory1]
  assert len(set(here)) == 4


def test_seed_index_split_and_variant_all_matter():
  clips = [render(c, s, i) for c in (PROMPT, dataclasses.replace(PROMPT, split="test")) for s in (0, 1) for i in (0, 1)]
  assert len({digest(c) for c in clips}) == 8


def test_mixture_keeps_to_its_share():
  memory = dataclasses.replace(MEMORY, chunks=5, glyph_size=(12, 12))
  prompt = dataclasses.replace(PROMPT, chunks=5)
  picks = [render_mixed(prompt, memory, 0.3, 0, i) for i in range(200)]
  assert 0.2 < np.mean([c.reveal_chunk >= 0 for c in picks]) < 0.4
  assert digest(picks[7]) == digest(render_mixed(prompt, memory, 0.3, 0, 7))
  assert render_mixed(prompt, memory, 0.0, 0, 0).reveal_chunk == -1
  with pytest.raises(ValueError, match="chunks: "):
    render_mixed(PROMPT, MEMORY, 0.5, 0, 0)
  with pytest.raises(ValueError, match="p_memory: 2"):
    render_mixed(prompt, memory, 2, 0, 0)


# --- captions


def test_captions_tell_what_is_there():
  kinds = {"full": 0, "colour": 0, "none": 0}
  for i in range(150):
    clip = render(dataclasses.replace(PROMPT, chunks=1), 0, i)
    assert len(set(clip.colours)) == len(set(clip.labels.tolist())) == len(clip.labels)
    assert set(clip.caption.split()) <= set(WORDS)
    full = {f"a {c} {label}" for c, label in zip(clip.colours, clip.labels, strict=True)}
    colour = {f"a {c} digit" for c in clip.colours}
    said = set(clip.caption.split(" and ")) if clip.caption else set()
    bar = digits._plan(dataclasses.replace(PROMPT, chunks=1), 0, i).cover is not None
    assert ("a bar" in said) == (bar and said != set())
    said -= {"a bar"}
    kind = next(k for k, v in (("none", set()), ("full", full), ("colour", colour)) if v == said)
    kinds[kind] += 1
  assert 55 < kinds["full"] < 95 and 40 < kinds["colour"] < 80 and 4 < kinds["none"] < 30


def test_memory_captions_never_name_a_class():
  plans = [digits._plan(MEMORY, 0, i) for i in range(400)]
  captions = [digits._caption(p, handwriting.load("train")[1][list(p.samples)]) for p in plans]
  assert not any(ch.isdigit() for c in captions for ch in c) and not any("bar" in c for c in captions)
  assert 0.12 < np.mean([c == "" for c in captions]) < 0.28


# --- ground truth and pixels


def colour_share(crop: np.ndarray, name: str) -> float:
  """Share of pixels close to a digit colour."""
  return float((np.abs(crop.astype(int) - np.array(COLOURS[name])).max(-1) < 40).mean())


@pytest.mark.parametrize("config", [PROMPT, MEMORY])
def test_boxes_and_visibility_agree_with_the_frames(config):
  whole, covered = 0, 0
  for index in range(6):
    clip = render(config, 1, index)
    f, n = frames_of_chunks(config.chunks), len(clip.labels)
    assert clip.frames.shape == (f, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.boxes.shape == (f, n, 4) and clip.visibility.shape == (f, n)
    assert clip.visibility.min() >= 0 and clip.visibility.max() <= 1
    for t in range(0, f, 5):
      for i in range(n):
        x0, y0, x1, y1 = clip.boxes[t, i]
        crop = clip.frames[t, max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))]
        if clip.visibility[t, i] == 1:
          whole += 1
          assert min(x0, y0) >= -3 and max(x1, y1) <= 67  # an empty outer column of the 8x8 image may be outside
          assert colour_share(crop, clip.colours[i]) > 0.05
        elif clip.visibility[t, i] == 0:
          covered += 1
          assert crop.size == 0 or colour_share(clip.frames[t], clip.colours[i]) == 0
  assert whole > 40 and (covered > 0 or config is PROMPT)


def test_two_digits_of_a_prompt_keep_apart():
  for index in range(20):
    boxes = render(dataclasses.replace(PROMPT, chunks=7, min_digits=2), 5, index).boxes
    apart = np.maximum(boxes[:, 1, :2] - boxes[:, 0, 2:], boxes[:, 0, :2] - boxes[:, 1, 2:]).max(-1)
    assert (apart >= 0).all()


@pytest.mark.parametrize("config", [PROMPT, MEMORY])
def test_digits_walk_a_pixel_a_frame_and_turn_on_the_token_grid(config):
  for index in range(8):
    clip = render(config, 4, index)
    at = clip.boxes[..., :2]
    assert (at == np.round(at)).all()
    assert (at[::4] % 4 == 0).all()  # pixel frame 4 i ends latent i
    step = np.abs(np.diff(at, axis=0)).max(-1)
    assert np.isin(step, [0, 1]).mean() > 0.9  # the rest: on their way in
    if config is PROMPT:
      assert (np.isin(step, [0, 1])).all() and (step == 1).mean() > 0.8


def test_a_bar_hides_digits_of_the_prompt_variant_now_and_then():
  config = dataclasses.replace(PROMPT, chunks=7, p_occluder=1.0, max_digits=1)
  least = [render(config, 0, i).visibility.min() for i in range(12)]
  assert min(least) < 0.5 and all(render(config, 0, i).reveal_chunk == -1 for i in range(2))


@pytest.mark.parametrize("entry", ["any", "late"])
def test_timeline_of_the_memory_variant(entry):
  seen = set()
  for index in range(25):
    clip = render(MEMORY if entry == "any" else dataclasses.replace(MEMORY, hide_fixed=2), 2, index)
    visible, chunks = clip.visibility[:, 0], np.array([chunk_of_frame(f) for f in range(len(clip.frames))])
    first, again = clip.hidden[0]
    start, stop = clip.prefix_chunks, clip.reveal_chunk
    seen.add(int(clip.entry_chunk[0]))
    # hidden for whole chunks and part of the one before
    assert stop - start == clip.hidden_chunks
    # a cover moves 3.5 pixels a frame or more; a thin 1 may lie 12 pixels within it
    assert first_frame(start) - 8 <= first <= first_frame(start) and first_frame(stop) <= again <= first_frame(stop) + 3
    assert (visible[first:again] == 0).all() and visible[first - 1] > 0 and visible[again] > 0
    assert [c for c in range(MEMORY.chunks) if (visible[chunks == c] == 0).all() and c > clip.entry_chunk[0]] == list(
      range(start, stop)
    )
    # it enters in its chunk, is seen whole for a chunk, and is seen again for a chunk and a half
    assert chunk_of_frame(int(np.flatnonzero(visible)[0])) == clip.entry_chunk[0]
    assert any((visible[chunks == c] == 1).all() for c in range(clip.entry_chunk[0], start))
    assert (visible[again:] > 0).all() and (visible[again:] == 1).sum() >= 16 and len(visible) - again >= 18
    # a second digit is never covered
    assert (clip.visibility[:, 1:] == 1).all() and (clip.hidden[1:] == -1).all()
    # the last latent frame of the prefix shows the cover at rest
    rest = slice(first_frame(start) - 4, first_frame(stop))
    assert (np.ptp(clip.boxes[rest, 0], axis=0) == 0).all()
  assert seen >= {0, 1, 2}


def test_countdown_ends_with_the_uncovering():
  clip = render(dataclasses.replace(MEMORY, max_digits=1), 0, 4)
  rest, lift = first_frame(clip.prefix_chunks) - 4, first_frame(clip.reveal_chunk)
  background = clip.frames[0, 60:].astype(float)
  lit = (clip.frames[:, 60:].astype(float) - background) / (245 - background)
  length = np.median(lit.mean(-1), axis=1).sum(-1)
  # two pixels for every chunk still to come, its own included; a cover that slides is seen in the line's rows, too
  expected = [2 * (clip.reveal_chunk - chunk_of_frame(t)) for t in range(rest, lift)]
  assert expected[0] == 2 * clip.hidden_chunks + 2 and expected[-1] == 2
  np.testing.assert_allclose(length[rest:lift], expected, atol=0.05)
  assert length[lift + 8] == 0


def test_hidden_frames_do_not_depend_on_the_class():
  labels = handwriting.load("train")[1]
  for index in range(12):
    plan = digits._plan(MEMORY, 7, index)
    clip = digits._draw(plan)
    for label in (int(clip.labels[0]) + 1) % 10, (int(clip.labels[0]) + 5) % 10:
      other = int(np.flatnonzero(labels == label)[index])
      swapped = digits._draw(dataclasses.replace(plan, samples=(other, *plan.samples[1:])))
      assert swapped.labels[0] == label and swapped.caption == clip.caption
      first, again = np.maximum(swapped.hidden[0], clip.hidden[0])[0], np.minimum(swapped.hidden[0], clip.hidden[0])[1]
      assert first <= first_frame(clip.prefix_chunks) and again >= first_frame(clip.reveal_chunk)
      np.testing.assert_array_equal(clip.frames[first:again], swapped.frames[first:again])
      np.testing.assert_array_equal(clip.boxes, swapped.boxes)
      assert (clip.frames[first - 3] != swapped.frames[first - 3]).any()


def test_a_second_digit_gives_no_hint_of_the_first():
  pairs = [digits._plan(dataclasses.replace(MEMORY, min_digits=2), 0, i).samples for i in range(600)]
  labels = handwriting.load("train")[1][np.array(pairs)]
  assert 0.05 < (labels[:, 0] == labels[:, 1]).mean() < 0.16  # a tenth, as if drawn alone


# --- evaluation clips and configs


@pytest.mark.parametrize("hide", [3, 9, 18])
def test_evaluation_clips_share_their_prefix(hide):
  config = DigitsConfig("memory", "test", chunks=chunks_for(hide), hide_fixed=hide)
  clips = [render(config, 0, i) for i in range(8)]
  assert {(c.prefix_chunks, c.reveal_chunk, c.hidden_chunks) for c in clips} == {(5, 5 + hide, hide)}
  assert {int(c.entry_chunk[0]) for c in clips} == {0, 1, 2}


@settings(max_examples=60, deadline=None)
@given(chunks=st.integers(5, 20), max_entry=st.integers(0, 6), seed=st.integers(0, 999), fixed=st.booleans())
def test_every_timeline_fits_its_clip(chunks, max_entry, seed, fixed):
  hide = min(1 + seed % 19, chunks - 4) if fixed else None
  config = DigitsConfig("memory", chunks=chunks, max_entry=max_entry, hide_fixed=hide)
  entry, start, stop = digits._timeline(config, np.random.default_rng(seed))
  assert 0 <= entry <= max_entry and start >= (2 if entry == 0 else entry + 3) and start < stop <= chunks - 2
  assert hide is None or stop - start == hide


@settings(max_examples=100, deadline=None)
@given(
  at=st.floats(-200, 200),
  velocity=st.floats(-3, 3),
  low=st.floats(0, 10),
  room=st.one_of(st.just(0.0), st.floats(1, 40)),
)
def test_bounces_stay_inside_and_keep_their_speed(at, velocity, low, room):
  way = at + velocity * np.arange(50)
  path = digits._fold(way, low, low + room)
  assert (path >= low - 1e-6).all() and (path <= low + room + 1e-6).all()
  assert (np.abs(np.diff(path)) <= abs(velocity) + 1e-6).all()


def test_training_lengths():
  def hidden(chunks):
    config = DigitsConfig("memory", chunks=chunks)
    timelines = [digits._timeline(config, np.random.default_rng(i)) for i in range(500)]
    return np.bincount([stop - start for _, start, stop in timelines], minlength=11) / 500, {t[0] for t in timelines}

  short, _ = hidden(7)
  assert (short[1:4] > 0.1).all() and short[4:].sum() == 0
  long, entries = hidden(14)
  assert abs(long[1:3].sum() - 0.5) < 0.08 and abs(long[3:7].sum() - 0.33) < 0.08 and (long[7:] > 0).all()
  assert entries == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(variant="both"), 'variant: \'both\' is not accepted; "prompt" or "memory"'),
    (dict(split="val"), "split: 'val'"),
    (dict(chunks=0), "chunks: 0 is not accepted; at least 1"),
    (dict(min_digits=0), "min_digits: 0"),
    (dict(min_digits=2, max_digits=1), "max_digits: 1"),
    (dict(glyph_size=(22, 18)), "glyph_size: "),
    (dict(caption_mix=(0.5, 0.5, 0.5)), "caption_mix: "),
    (dict(variant="memory", caption_mix=(0.5, 0.5, 0.0)), "caption_mix: .* never names"),
    (dict(p_occluder=2), "p_occluder: 2"),
    (dict(max_entry=-1), "max_entry: -1"),
    (dict(hide_chunks=((1.0, 0, 2),)), "hide_chunks: "),
    (dict(hide_fixed=3), 'hide_fixed: 3 .*"memory"'),
    (dict(variant="memory", hide_fixed=0), "hide_fixed: 0"),
    (dict(variant="memory", hide_fixed=9, chunks=12), "chunks: 12 is not accepted; at least 13 to hide a digit for 9"),
    (dict(variant="memory", chunks=4), "chunks: 4 is not accepted; at least 5"),
  ],
)
def test_config_errors_name_the_field(change, message):
  with pytest.raises(ValueError, match=message):
    DigitsConfig(**change)
