"""Scores of the truth: real clips are nearly perfect, wrong prompts are at chance, and what is not there is wrong."""

import dataclasses

import numpy as np
import pytest

from sfjax import instrument
from sfjax.data.digits import FPS, DigitsConfig, render
from sfjax.evaluation import clips
from sfjax.evaluation.scores import answer, identity_kept, jerk, memory_scores, prompt_scores, sharpness_drift, speed
from sfjax.instrument import IN_SIGHT, NONE, Reading

VIDEOS, CHUNKS, SECONDS = 60, 3, 2.0


@pytest.fixture(scope="module")
def params():
  return instrument.load()[0]


def look(params, videos):
  """What is true of the clips, and what the instrument reads in them."""
  asked = clips.truth(videos)
  frames = np.stack([clip.frames for clip in videos])
  return asked, instrument.read(params, frames[:, :, None].repeat(2, 2), asked.colours[:, None].repeat(33, 1))


@pytest.fixture(scope="module")
def real(params):
  return look(params, [clips.prompt_clip(3, i, CHUNKS) for i in range(VIDEOS)])


def at(asked, seen, labels=None):
  edges = np.ones(seen.area.shape[:2])
  return prompt_scores(seen, edges, asked.labels if labels is None else labels, asked.present, FPS, SECONDS)


def test_prompts_are_the_captions_of_the_clips():
  asked = clips.prompts(3, VIDEOS)
  for i in range(VIDEOS):
    clip = clips.prompt_clip(3, i, CHUNKS)
    assert clip.caption == asked.captions[i] and asked.present[i].sum() == len(clip.labels)
    assert clip.labels.tolist() == asked.labels[i][asked.present[i]].tolist()
    assert all(str(label) in clip.caption for label in clip.labels)


def test_real_clips_score_near_one(real):
  scores = at(*real)
  assert scores["accuracy, whole"].mean() > 0.94 and scores["accuracy, last second"].mean() > 0.94
  assert scores["in sight, last second"].mean() > 0.99
  assert scores["identity kept"].dtype == bool and scores["identity kept"].mean() > 0.94
  assert np.nanmean(scores["jerk"]) < 0.1
  assert (scores["sharpness drift"] == 1).all()


def test_real_clips_with_bars_score_a_little_less(params):
  bars = DigitsConfig(split="test", chunks=CHUNKS, caption_mix=(1.0, 0.0, 0.0))
  scores = at(*look(params, [render(bars, 3, i) for i in range(VIDEOS)]))
  assert scores["accuracy, whole"].mean() > 0.92 and scores["accuracy, last second"].mean() > 0.88
  assert 0.85 < scores["in sight, last second"].mean() < 0.99


def test_wrong_prompts_score_at_chance(real):
  asked, seen = real
  shuffled = np.random.default_rng(0).integers(0, 10, asked.labels.shape)
  assert at(asked, seen, shuffled)["accuracy, whole"].mean() < 0.2
  assert at(asked, seen, (asked.labels + 1) % 10)["accuracy, whole"].mean() < 0.05


def reading(classes, area=100.0, centroid=None):
  """A reading that is certain of its classes [V,F,n]."""
  classes = np.asarray(classes)
  where = np.zeros((*classes.shape, 2)) if centroid is None else centroid
  return Reading(np.eye(11)[classes], np.broadcast_to(area, classes.shape), where)


def test_a_digit_never_in_sight_makes_the_video_wrong():
  present, labels = np.array([[True, True], [True, False]]), np.array([[3, 7], [3, 0]])
  area = np.full((2, 32, 2), 100.0)
  area[:, :, 1] = 0
  scores = prompt_scores(
    reading(np.broadcast_to(labels[:, None], (2, 32, 2)), area), np.ones((2, 32)), labels, present, 16, 2.0
  )
  assert scores["accuracy, whole"].tolist() == [0, 1] and scores["in sight, last second"].tolist() == [0.5, 1]


def test_identity_is_kept_or_not():
  classes = np.array([[[4]] * 8, [[4]] * 4 + [[9]] * 4, [[NONE]] * 8])
  kept = identity_kept(reading(classes), np.ones((3, 1), bool), slice(0, 3), slice(5, 8))
  assert kept.tolist() == [True, False, False]


def test_jerk_and_drift():
  t = np.arange(10.0)
  line, zigzag = np.stack([t, 2 * t], -1), np.stack([t % 2, t * 0], -1)
  still = jerk(
    reading(np.zeros((2, 10, 1), int), centroid=np.stack([line, zigzag])[:, :, None]),
    np.ones((2, 1), bool),
    slice(0, 10),
  )
  np.testing.assert_allclose(still, [0, 1])  # 2 pixels along x, 0 along y
  unseen = jerk(reading(np.zeros((1, 10, 1), int), area=IN_SIGHT - 1), np.ones((1, 1), bool), slice(0, 10))
  assert np.isnan(unseen).all()
  area = np.full((3, 10, 1), 100.0)
  area[2, 5:] = IN_SIGHT - 1
  drawn = reading(np.zeros((3, 10, 1), int), area, np.stack([line, zigzag, line])[:, :, None])
  np.testing.assert_allclose(speed(drawn, np.ones((3, 1), bool), slice(0, 10), 4.0), [5**0.5 * 4, 0, 5**0.5 * 4])
  assert np.isnan(speed(drawn, np.zeros((3, 1), bool), slice(0, 10), 4.0)).all()
  np.testing.assert_allclose(sharpness_drift(np.array([[4.0, 4, 1, 1]]), slice(0, 2), slice(2, 4)), [0.25])


def test_an_answer_is_the_mean_over_the_frames_asked_for():
  p = np.eye(11)[[1, 2, 2, 5]]
  assert answer(p, np.array([True, True, True, False])) == 2
  assert answer(p, np.array([False] * 4)) == NONE


def test_real_endings_are_remembered_and_twins_differ_in_the_digit_alone(params):
  clip = clips.hidden(5, np.arange(12), 1)
  seen = instrument.read(params, clip.ending, clip.colours)
  rival = clip.labels.reshape(-1, 2)[:, ::-1].reshape(-1)
  scores = memory_scores(seen, clip.labels, clip.revealed, rival)
  assert scores["accuracy"].mean() > 0.9 and scores["the other's digit"].mean() < 0.1
  assert clip.revealed[:, 8:].all() and not clip.revealed[:, 0].any()
  even, odd = ({f.name: getattr(clip, f.name)[i::2] for f in dataclasses.fields(clip)} for i in (0, 1))
  assert (even["labels"] != odd["labels"]).all()
  for name in ("captions", "colours", "boxes"):
    assert np.array_equal(even[name], odd[name])
  np.testing.assert_array_equal(even["prefix"][:, -1], odd["prefix"][:, -1])  # the cover rests on both
