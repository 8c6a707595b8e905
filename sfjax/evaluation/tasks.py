"""The two tasks, arm by arm and batch by batch: videos from prompts, and real clips that hide a digit, continued.

All arms get the same prompts, clips and noise, so that their scores can be compared video by video.

Letters: V videos.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from sfjax.data.digits import FPS, chunk_of_frame
from sfjax.evaluation import clips, interventions
from sfjax.evaluation.arms import SHOWN, Arm, View, append, look, roll
from sfjax.evaluation.report import REAL, Scores
from sfjax.evaluation.scores import memory_scores, prompt_scores
from sfjax.memory import stored_blocks

_TAIL = 2  # chunks from the uncovering on
Show = Callable[[str, str, UInt8[np.ndarray, "V F 64 64 3"]], None]


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much to measure.

  Attributes:
    videos, batch: of every arm and condition, and side by side. seed: of clips and noise.
    show: gets the pixels of the first videos of (condition, row). advance: is called after every generated chunk.
  """

  videos: int
  batch: int
  seed: int
  show: Show
  advance: Callable[[], None]

  def batches(self) -> Iterator[Int[np.ndarray, " B"]]:
    """Indices of videos; the last batch is filled up from the beginning, so that all have one size."""
    for i in range(0, self.videos, self.batch):
      yield np.arange(i, i + self.batch) % self.videos

  @property
  def key(self):
    """Of the noise."""
    return jax.random.key(self.seed)


def _join(plan: Plan, parts: list):
  """Batches of trees of arrays as one tree of the videos asked for."""
  return jax.tree.map(lambda *x: np.concatenate(x)[: plan.videos], *parts)


def prompt_chunks(arm: Arm, seconds: list[float]) -> int:
  """Chunks an arm makes for every batch of the prompt task; a bidirectional model's chunk is a whole clip."""
  return arm.sampler.chunk_of_frame(round(max(seconds) * FPS) - 1) + 1


def prompt_task(plan: Plan, arms: list[Arm], classifier: dict, seconds: list[float]) -> Scores:
  """Videos from prompts, judged at several horizons; one rollout serves all of them."""
  asked = clips.prompts(plan.seed, plan.videos)
  chunks, longest = chunk_of_frame(round(max(seconds) * FPS) - 1) + 1, f"{max(seconds):g} s"
  seen: dict[str, View] = {REAL: _real_prompts(plan, asked, classifier, chunks)}
  plan.show(longest, REAL, seen[REAL].pixels)
  for arm in arms:
    parts = []
    for rows in plan.batches():
      memory = arm.start([asked.captions[i] for i in rows], plan.seed)
      mine = prompt_chunks(arm, seconds)
      _, view = roll(arm, classifier, memory, plan.key, rows, asked.colours[rows], mine, plan.advance)
      if not parts:
        plan.show(longest, arm.name, view.pixels)
      parts.append((view.reading, view.edges))
    seen[arm.name] = View(*_join(plan, parts), None)
  return {
    f"{s:g} s": {
      row: prompt_scores(view.reading, view.edges, asked.labels, asked.present, FPS, s) for row, view in seen.items()
    }
    for s in seconds
  }


def _real_prompts(plan: Plan, asked: clips.Prompts, classifier: dict, chunks: int) -> View:
  """The real clips of the prompts, one by one: a minute of them is many pixels."""
  parts, shown = [], []
  for index in range(plan.videos):
    frames = clips.prompt_clip(plan.seed, index, chunks).frames[None]
    view = look(classifier, frames, asked.colours[index][None])
    parts.append(jax.device_get((view.reading, view.edges)))
    if index < SHOWN:
      shown.append(frames)
  return View(*_join(plan, parts), np.concatenate(shown))


def memory_chunks(hide: int, arm: Arm, intervene: list[str]) -> int:
  """Chunks an arm makes for every batch of one hiding time."""
  return hide + _TAIL * (1 + (len(intervene) if arm.memory.persistent else 0))


def memory_task(plan: Plan, arms: list[Arm], classifier: dict, hides: list[int], intervene: list[str]) -> Scores:
  """Real clips that show a digit and cover it, continued until it is uncovered; P may be changed right before that."""
  scores: Scores = {}
  for hide in hides:
    condition = f"hidden {hide} chunks"
    real = [clips.hidden(plan.seed, rows, hide) for rows in plan.batches()]
    parts = [
      memory_scores(_first_digit(look(classifier, r.ending, r.colours)), r.labels, r.revealed) for r in real
    ]  # fmt: skip
    scores[condition] = {REAL: _join(plan, parts)}
    plan.show(condition, REAL, np.concatenate([real[0].prefix, real[0].ending], 1)[:SHOWN])
    for arm in arms:
      parts = []
      for rows, clip in zip(plan.batches(), real, strict=True):
        found, pixels = _continue(plan, arm, classifier, rows, clip, hide, intervene)
        for row in pixels if not parts else ():
          plan.show(condition, row, np.concatenate([clip.prefix[:SHOWN], pixels[row]], 1))
        parts.append(found)
      scores[condition] |= _join(plan, parts)
  return scores


def _first_digit(view: View):
  return jax.tree.map(lambda x: np.asarray(x)[:, :, 0], view.reading)


def _continue(plan: Plan, arm: Arm, classifier: dict, rows, clip: clips.Hidden, hide: int, intervene: list[str]):
  """One batch of one arm: scores and shown pixels, both by row of the table."""
  go = lambda a, memory, chunks: roll(a, classifier, memory, plan.key, rows, clip.colours, chunks, plan.advance)
  memory = append(arm, arm.start(clip.captions, plan.seed), clip.prefix)
  memory, covered = go(arm, memory, hide)
  rival = clip.labels.reshape(-1, 2)[:, ::-1].reshape(-1)
  held = {}
  forks = {arm.name: (arm, memory, None)}
  if arm.memory.persistent:
    model, batch = arm.config.model, len(rows)
    holding = np.stack(
      [interventions.tiles_with_digit(model, *truth) for truth in zip(clip.boxes, clip.visibility, strict=True)]
    )
    origins = stored_blocks(arm.memory, memory)[:, :batch]
    held = interventions.persistent_shares(arm.memory, origins, holding, model.layout.whole_blocks)
    copy = lambda: jax.tree.map(jnp.copy, memory)  # every fork consumes its own
    if "empty" in intervene:
      cfg, emptied = interventions.without_persistent(arm.memory, copy())
      forks[f"{arm.name}, P emptied"] = (dataclasses.replace(arm, memory=cfg), emptied, None)
    if "swap" in intervene:
      forks[f"{arm.name}, P swapped"] = (arm, interventions.swap_persistent(arm.memory, copy()), rival)
  scores, pixels = {}, {}
  for row, (forked, state, other) in forks.items():
    _, view = go(forked, state, _TAIL)
    scores[row] = memory_scores(_first_digit(view), clip.labels, clip.revealed, other)
    pixels[row] = np.concatenate([covered.pixels, view.pixels], 1)
  scores[arm.name] |= held
  return scores, pixels
