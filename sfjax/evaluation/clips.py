"""Real clips of the test split: what an arm is asked for, the truth about it, and the real video beside which it stands.

Letters: V videos, n digits a video may have, F frames.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from sfjax import instrument
from sfjax.data import digits
from sfjax.data.digits import Clip, DigitsConfig, chunks_for, first_frame

_DIGITS = 2


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Captions that name digits and colours, and their truth; `present` masks the digits a video has."""

  captions: list[str]
  labels: Int[np.ndarray, "V n"]
  colours: Int[np.ndarray, "V n"]
  present: Bool[np.ndarray, "V n"]


def prompt_clip(seed: int, index: int, chunks: int) -> Clip:
  """A clip whose caption names its digits, with no bar to hide them; the caption does not depend on the length."""
  config = DigitsConfig(split="test", chunks=chunks, caption_mix=(1.0, 0.0, 0.0), p_occluder=0.0)
  return digits.render(config, seed, index)


def prompts(seed: int, videos: int) -> Prompts:
  """The prompts of clips 0..videos-1."""
  return truth([prompt_clip(seed, index, 1) for index in range(videos)])


def truth(clips: list[Clip]) -> Prompts:
  """What is true of some clips."""
  fill = lambda values: np.stack([np.pad(v, (0, _DIGITS - len(v))) for v in values])
  return Prompts(
    captions=[c.caption for c in clips],
    labels=fill([c.labels for c in clips]),
    colours=fill([[instrument.colour_index(name) for name in c.colours] for c in clips]),
    present=fill([np.ones(len(c.labels), bool) for c in clips]),
  )


@dataclasses.dataclass(frozen=True)
class Hidden:
  """Clips in which a digit is covered for whole chunks; videos 2i and 2i + 1 differ in that digit and in nothing else.

  Attributes:
    colours: of the covered digit, [V,1].
    prefix, ending: the frames that show the digit and cover it, and those from the uncovering on.
    revealed: which of the ending's frames show it whole. boxes, visibility: of the covered digit, up to the uncovering.
  """

  captions: list[str]
  labels: Int[np.ndarray, " V"]
  colours: Int[np.ndarray, "V 1"]
  prefix: UInt8[np.ndarray, "V F 64 64 3"]
  ending: UInt8[np.ndarray, "V F 64 64 3"]
  revealed: Bool[np.ndarray, "V F"]
  boxes: Float[np.ndarray, "V F 4"]
  visibility: Float[np.ndarray, "V F"]


def hidden(seed: int, indices: Int[np.ndarray, " V"], hide: int) -> Hidden:
  """Videos of these indices that hide a digit for `hide` chunks; 2i and 2i + 1 are twins."""
  config = DigitsConfig(variant="memory", split="test", hide_fixed=hide, chunks=chunks_for(hide))
  clips = [digits.render_twins(config, seed, int(index) // 2)[index % 2] for index in indices]
  lift = first_frame(clips[0].reveal_chunk)
  begin = first_frame(clips[0].prefix_chunks)
  return Hidden(
    captions=[c.caption for c in clips],
    labels=np.array([c.labels[0] for c in clips]),
    colours=np.array([[instrument.colour_index(c.colours[0])] for c in clips]),
    prefix=np.stack([c.frames[:begin] for c in clips]),
    ending=np.stack([c.frames[lift:] for c in clips]),
    revealed=np.stack([c.visibility[lift:, 0] == 1 for c in clips]),
    boxes=np.stack([c.boxes[:lift, 0] for c in clips]),
    visibility=np.stack([c.visibility[:lift, 0] for c in clips]),
  )
