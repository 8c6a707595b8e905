"""Moving digits: an endless, seeded source of short videos whose content a caption or a memory must explain.

Two variants share one renderer. "prompt": coloured digits bounce about, and the caption tells which. "memory": a digit
enters, parks, is covered by a box for whole chunks and uncovered again; its caption never tells the class, so only what
the video showed before can. A line at the bottom of the frame counts down to the uncovering. Digits walk
a pixel a frame and turn on the grid of tokens: a latent frame later their pixels are a neighbouring token's, bounce or not.

A clip is made in two steps: `_plan` draws everything that may not depend on a digit's class, and last of all which
handwriting is shown; `_draw` turns a plan into pixels and ground truth.

Letters: F pixel frames, n digits. Positions are (x, y) in pixels, of the top left corner.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from sfjax.data import handwriting

SIZE = 64  # rows and columns of a frame
FPS = 16
COLOURS = {
  "red": (235, 45, 45),
  "green": (50, 200, 70),
  "blue": (60, 105, 255),
  "yellow": (240, 225, 50),
  "magenta": (225, 60, 225),
  "cyan": (50, 220, 235),
}
WORDS = ("a", "and", "bar", "digit", *COLOURS, *(str(label) for label in range(handwriting.CLASSES)))
VARIANTS = ("prompt", "memory")

_TOKEN = 4  # pixels of a token, and frames of a latent
_CHUNK = 12  # pixel frames of every chunk but the first
_SLIDE = 8  # frames in which a digit enters, and in which the cover slides on or off
_TAIL = 2  # chunks from the uncovering on: the slide, then at least a chunk of rest
_MARGIN = 3  # pixels by which the cover exceeds the largest glyph on every side
_WAY_IN = 32  # pixels from outside the frame to full view: a token a frame
_DIRECTIONS = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y])
_LINE_ROWS = 4
_LINE_PER_CHUNK = 2  # pixels of the countdown for a chunk still to come: half a token
_LINE_COLOUR = 245
_FLOOR = SIZE - _LINE_ROWS  # digits of the memory variant stay above the line
_MAX_HIDE = 19  # chunks; the frame is wide enough for more


def frames_of_chunks(n_chunks: int) -> int:
  """Pixel frames of the first n chunks: 3 latent frames each, of 4 frames, but the very first latent is one frame."""
  return _CHUNK * n_chunks - 3


def chunk_of_frame(frame: int) -> int:
  """The chunk that a pixel frame belongs to."""
  return max(0, (frame + 3) // _CHUNK)


def first_frame(chunk: int) -> int:
  """The first pixel frame of a chunk."""
  return max(0, _CHUNK * chunk - 3)


def _earliest_hidden(entry: int) -> int:
  """First chunk that can be hidden: after one to enter (not for 0), one in full view, one in which the cover comes."""
  return 2 if entry == 0 else entry + 3


def chunks_for(hide: int, max_entry: int = 2) -> int:
  """Chunks of an evaluation clip that hides for `hide` chunks a digit that enters at chunks 0..max_entry."""
  return _earliest_hidden(max_entry) + hide + _TAIL


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
  """What a clip may contain.

  Attributes:
    variant: "prompt" (captioned digits) or "memory" (one digit is covered and uncovered; further ones stay in view).
    split: the handwriting, "train" or "test".
    chunks: length of a clip.
    min_digits, max_digits: digits of a clip.
    glyph_size: smallest and largest edge of a digit, in pixels.
    caption_mix: probabilities of captions that name (colour and digit, colour, nothing), and the bar; None takes
      (0.5, 0.4, 0.1), and (0, 0.8, 0.2) for the memory variant, which never names a digit.
    p_occluder: prompt variant: probability of a grey bar that digits pass behind.
    max_entry: memory variant: digits enter at chunks 0..max_entry, as far as the clip has room.
    hide_chunks: memory variant: (probability, fewest, most) hidden chunks; what does not fit in the clip is left out.
    hide_fixed: memory variant, evaluation: hide exactly so many chunks, equally late in every clip, so that all clips
      have the same `prefix_chunks`; the length to ask for is `chunks_for(hide_fixed)`.
  """

  variant: str = "prompt"
  split: str = "train"
  chunks: int = 7
  min_digits: int = 1
  max_digits: int = 2
  glyph_size: tuple[int, int] = (18, 22)
  caption_mix: tuple[float, float, float] | None = None
  p_occluder: float = 0.5
  max_entry: int = 4
  hide_chunks: tuple[tuple[float, int, int], ...] = ((0.5, 1, 2), (0.33, 3, 6), (0.17, 7, 10))
  hide_fixed: int | None = None

  def __post_init__(self):
    memory = self.variant == "memory"
    _check(self.variant in VARIANTS, "variant", self.variant, '"prompt" or "memory"')
    _check(self.split in handwriting.SPLITS, "split", self.split, '"train" or "test"')
    _check(self.chunks >= 1, "chunks", self.chunks, "at least 1")
    _check(1 <= self.min_digits <= 2, "min_digits", self.min_digits, "1 or 2")
    _check(self.min_digits <= self.max_digits <= 2, "max_digits", self.max_digits, "min_digits..2")
    low, high = self.glyph_size
    _check(8 <= low <= high <= 24, "glyph_size", self.glyph_size, "(smallest, largest) within 8..24")
    mix = self.mix
    _check(len(mix) == 3 and min(mix) >= 0 and abs(sum(mix) - 1) < 1e-6, "caption_mix", mix, "3 parts that sum to 1")
    _check(not (memory and mix[0]), "caption_mix", mix, "0 as its first part: the memory variant never names a digit")
    _check(0 <= self.p_occluder <= 1, "p_occluder", self.p_occluder, "0..1")
    _check(self.max_entry >= 0, "max_entry", self.max_entry, "at least 0")
    for part in self.hide_chunks:
      _check(
        part[0] > 0 and 1 <= part[1] <= part[2] <= _MAX_HIDE,
        "hide_chunks",
        part,
        f"(p > 0, low, high in 1..{_MAX_HIDE})",
      )
    if self.hide_fixed is not None:
      _check(memory, "hide_fixed", self.hide_fixed, 'None unless variant is "memory"')
      _check(1 <= self.hide_fixed <= _MAX_HIDE, "hide_fixed", self.hide_fixed, f"1..{_MAX_HIDE}")
    if memory:
      hide = self.hide_fixed or min(part[1] for part in self.hide_chunks)
      least = chunks_for(hide, max_entry=0)
      _check(self.chunks >= least, "chunks", self.chunks, f"at least {least} to hide a digit for {hide}")

  @property
  def mix(self) -> tuple[float, float, float]:
    """caption_mix, or the variant's default."""
    return self.caption_mix or ((0.0, 0.8, 0.2) if self.variant == "memory" else (0.5, 0.4, 0.1))

  @property
  def cover_size(self) -> int:
    """Edge of the cover: from the largest glyph allowed, so that it tells nothing about the one beneath."""
    return self.glyph_size[1] + 2 * _MARGIN


def _check(ok: bool, field: str, value, accepted: str):
  if not ok:
    raise ValueError(f"{field}: {value!r} is not accepted; {accepted}")


@dataclasses.dataclass(frozen=True)
class Clip:
  """A video and what is true about it.

  Attributes:
    frames: uint8 RGB.
    caption: may be empty.
    labels, colours: class and colour name of every digit; in the memory variant digit 0 is the one that gets covered.
    boxes: (x0, y0, x1, y1) in pixels of every digit's square cell; may reach beyond the frame while a digit enters.
    visibility: share of a digit's ink that is seen, exactly 0 and 1 at the ends.
    entry_chunk: chunk in which a digit enters; 0 also where it is there from the first frame.
    hidden: first frame in which the cover hides a digit wholly, and the first in which it is seen again; -1 without.
    hidden_chunks: chunks wholly inside that interval.
    prefix_chunks: leading chunks at whose end the cover rests on the digit; 0 without a cover.
    reveal_chunk: the chunk that uncovers the digit; -1 without a cover.
  """

  frames: UInt8[np.ndarray, "F 64 64 3"]
  caption: str
  labels: Int[np.ndarray, " n"]
  colours: tuple[str, ...]
  boxes: Float[np.ndarray, "F n 4"]
  visibility: Float[np.ndarray, "F n"]
  entry_chunk: Int[np.ndarray, " n"]
  hidden: Int[np.ndarray, "n 2"]
  hidden_chunks: int
  prefix_chunks: int
  reveal_chunk: int


def render(config: DigitsConfig, seed: int, index: int) -> Clip:
  """Clip number `index` of the stream `seed`: the same in any process and any order."""
  return _draw(_plan(config, seed, index))


def render_twins(config: DigitsConfig, seed: int, index: int) -> tuple[Clip, Clip]:
  """Clip number `index` of the memory variant, and the same scene with another digit under the cover."""
  plan = _plan(config, seed, index)
  labels = handwriting.load(config.split)[1]
  others = np.flatnonzero(labels != labels[plan.samples[0]])
  other = int(np.random.default_rng([seed, index]).choice(others))
  return _draw(plan), _draw(dataclasses.replace(plan, samples=(other, *plan.samples[1:])))


def render_mixed(prompt: DigitsConfig, memory: DigitsConfig, p_memory: float, seed: int, index: int) -> Clip:
  """Clip number `index` of a stream in which a share p_memory comes from the second config.

  Raises:
    ValueError: p_memory is not in 0..1, or the configs' clips differ in length.
  """
  _check(0 <= p_memory <= 1, "p_memory", p_memory, "0..1")
  _check(prompt.chunks == memory.chunks, "chunks", (prompt.chunks, memory.chunks), "the same in both configs")
  pick = np.random.default_rng([seed, index, len(VARIANTS) * len(handwriting.SPLITS)]).random()
  return render(memory if pick < p_memory else prompt, seed, index)


# --- plan: everything but the class ---


@dataclasses.dataclass(frozen=True)
class _Cover:
  """A grey rounded box in front of the digits: its pixels (height, width), its path, and the frames it is drawn in."""

  shape: tuple[int, int]
  path: Float[np.ndarray, "F 2"]
  grey: int
  span: slice


@dataclasses.dataclass(frozen=True)
class _Plan:
  split: str
  background: UInt8[np.ndarray, "64 64 3"]
  sizes: tuple[int, ...]
  colours: tuple[str, ...]
  paths: Float[np.ndarray, "F n 2"]
  entry: tuple[int, ...]
  cover: _Cover | None
  line: Float[np.ndarray, " F"] | None  # pixels of the countdown
  hide: tuple[int, int] | None  # first chunk hidden, first chunk after
  naming: int  # what the caption names: 0 colour and digit, 1 colour, 2 nothing
  order: tuple[int, ...]  # of the digits in the caption
  samples: tuple[int, ...]  # index of the handwriting; drawn last


def _plan(config: DigitsConfig, seed: int, index: int) -> _Plan:
  stream = VARIANTS.index(config.variant) * len(handwriting.SPLITS) + handwriting.SPLITS.index(config.split)
  rng = np.random.default_rng([seed, index, stream])
  n = int(rng.integers(config.min_digits, config.max_digits + 1))
  low, high = config.glyph_size
  sizes = tuple(int(size) for size in rng.integers(low, high + 1, n))
  scene = dict(
    split=config.split,
    background=_background(rng),
    sizes=sizes,
    colours=tuple(rng.permutation(list(COLOURS))[:n].tolist()),
    naming=int(rng.choice(3, p=config.mix)),
    order=tuple(rng.permutation(n).tolist()),
  )
  scene |= (_memory_scene if config.variant == "memory" else _prompt_scene)(config, rng, sizes)
  # classes are distinct where a caption tells them apart; where one is to be remembered, another may not give a hint
  labels = rng.choice(handwriting.CLASSES, n, replace=config.variant == "memory")
  return _Plan(**scene, samples=tuple(int(rng.choice(handwriting.members(config.split, label))) for label in labels))


def _prompt_scene(config: DigitsConfig, rng, sizes) -> dict:
  """Digits that bounce about from the first frame on, two of them each in its half, and at times a bar in front of them."""
  frames = frames_of_chunks(config.chunks)
  time, axis, paths = np.arange(frames)[:, None], int(rng.integers(2)), []
  for i, size in enumerate(sizes):
    low, room = np.zeros(2, np.int64), np.full(2, SIZE - size)
    if len(sizes) == 2:
      low[axis], room[axis] = i * SIZE // 2, SIZE // 2 - size
    high = low + _on_grid(room)
    paths.append(_fold(_place(rng, low, high) + _velocity(rng) * time, low, high))
  cover = None
  if rng.random() < config.p_occluder:
    thick, length = int(rng.integers(9, 15)), int(rng.integers(28, 49))
    shape = (length, thick) if rng.random() < 0.5 else (thick, length)
    room = np.array([SIZE - shape[1], SIZE - shape[0]])
    drift = rng.uniform(-0.2, 0.2, 2) * (rng.random() < 0.5)
    path = _fold(rng.uniform(0, room) + drift * time, 0, room)
    cover = _Cover(shape, path, int(rng.integers(95, 150)), slice(0, frames))
  return dict(paths=np.stack(paths, 1), entry=(0,) * len(sizes), cover=cover, line=None, hide=None)


def _memory_scene(config: DigitsConfig, rng, sizes) -> dict:
  """Digit 0 enters, parks, is covered and uncovered; a second digit keeps to the other half of the frame."""
  frames = frames_of_chunks(config.chunks)
  time = np.arange(frames)
  entry, start, stop = _timeline(config, rng)
  arrive, lift = first_frame(start - 1), first_frame(stop)

  # the half of the frame is chosen so that the cover over the digit stays inside it, too
  size, extra = sizes[0], -(-(config.cover_size - sizes[0]) // 2)
  mirror = rng.random() < 0.5
  low, high = np.zeros(2, np.int64), _on_grid(np.array([SIZE if len(sizes) == 1 else SIZE // 2 - extra, _FLOOR]) - size)
  sides = ((-1, 0), (0, -1), (0, 1), (1, 0))[: 4 if len(sizes) == 1 else 3]

  # the way along a folded straight line: fast in, at a walk, to a stop, and perhaps on when all is over; each part begins
  # with a latent frame, that is with a pixel frame that is one more than a multiple of four
  park = arrive - _TOKEN * int(rng.integers(0, 2))
  resume = lift + _SLIDE + _TOKEN * int(rng.integers(0, 3))
  speed = ((time < park) + (rng.random() < 0.5) * (time >= resume)) * (time > 0)
  at = _place(rng, low, high)
  if entry == 0:
    heading = _velocity(rng)
  else:
    side = np.array(sides[rng.integers(len(sides))])
    begin = first_frame(entry) - 1 + _TOKEN * int(rng.integers(0, 2))
    at = np.where(side < 0, _TOKEN - _WAY_IN, np.where(side > 0, SIZE, at))
    tilt = rng.integers(-1, 1, endpoint=True)  # sideways pixels per pixel inwards
    heading = -side + tilt * side[::-1]
    entering = (time > begin) & (time <= begin + _SLIDE)
    speed = np.where(time <= begin, 0, np.where(entering, _WAY_IN / _SLIDE, speed))
  way = at + heading * np.round(np.cumsum(speed))[:, None]
  # a digit on its way in is not folded: on that axis it is still beyond the wall it comes through
  outside = (way < low) & (at < low) | (way > high) & (at > high)
  path = np.where(outside, way, _fold(way, low, high))

  paths = [path]
  for other in sizes[1:]:
    near = np.array([SIZE // 2, 0])
    far = near + _on_grid(np.array([SIZE // 2, _FLOOR]) - other)
    paths.append(_fold(_place(rng, near, far) + _velocity(rng) * time[:, None], near, far))
  if mirror:
    paths = [np.stack([_on_grid(SIZE - s) - p[:, 0], p[:, 1]], 1) for p, s in zip(paths, sizes, strict=True)]

  # the cover rests on whole pixels, so that it is opaque to the last bit
  side = np.array(sides[rng.integers(len(sides))]) * ((-1, 1) if mirror else 1)
  edge = config.cover_size
  rest = np.round(paths[0][arrive] + size / 2 - edge / 2)
  away = np.abs(np.where(side < 0, rest + edge, SIZE - rest)) * side
  off = np.clip(1 - (time - arrive + 1) / _SLIDE, 0, 1) + np.clip((time - lift + 1) / _SLIDE, 0, 1)
  cover_path = np.round(rest + away * off[:, None])
  left = stop - (time + _TOKEN - 1) // _CHUNK  # chunks from each frame's own to the uncovering
  line = _LINE_PER_CHUNK * left * ((time >= arrive + _SLIDE) & (time < lift))
  cover = _Cover((edge, edge), cover_path, int(rng.integers(105, 140)), slice(arrive, min(lift + _SLIDE, frames)))
  entries = (entry,) + (0,) * (len(sizes) - 1)
  return dict(paths=np.stack(paths, 1), entry=entries, cover=cover, line=line, hide=(start, stop))


def _timeline(config: DigitsConfig, rng) -> tuple[int, int, int]:
  """Chunk in which the digit enters, first chunk hidden, first chunk after."""
  if config.hide_fixed is None:
    longest = config.chunks - chunks_for(0, max_entry=0)
    parts = [(p, low, min(high, longest)) for p, low, high in config.hide_chunks if low <= longest]
    weights = np.array([p for p, _, _ in parts])
    _, low, high = parts[rng.choice(len(parts), p=weights / weights.sum())]
    hide = int(rng.integers(low, high + 1))
  else:
    hide = config.hide_fixed
  latest = config.chunks - _TAIL - hide
  entries = [entry for entry in range(config.max_entry + 1) if _earliest_hidden(entry) <= latest]
  entry = int(rng.choice(entries))
  start = latest if config.hide_fixed else int(rng.integers(_earliest_hidden(entry), latest + 1))
  return entry, start, start + hide


def _on_grid(room):
  """The largest whole number of tokens in so many pixels."""
  return room // _TOKEN * _TOKEN


def _place(rng, low, high) -> Int[np.ndarray, " 2"]:
  """A random point of the token grid between two of its points."""
  return low + _TOKEN * rng.integers(0, (high - low) // _TOKEN, endpoint=True)


def _velocity(rng) -> Int[np.ndarray, " 2"]:
  """One of eight directions at a pixel a frame on each axis: a latent (4 frames) later, exactly one token (4 pixels) on."""
  return _DIRECTIONS[rng.integers(len(_DIRECTIONS))]


def _fold(way: Float[np.ndarray, "F 2"], low, high) -> Float[np.ndarray, "F 2"]:
  """A straight line folded into [low, high]: elastic bounces."""
  span = np.maximum(np.subtract(high, low), 1e-9)
  return low + span - np.abs((way - low) % (2 * span) - span)


def _smooth(cells: int) -> Float[np.ndarray, "64 cells"]:
  """Interpolation weights from a few cells to the frame's pixels, along raised cosines."""
  t = np.linspace(0, cells - 1, SIZE)[:, None] - np.arange(cells)
  return (0.5 + 0.5 * np.cos(np.pi * np.clip(t, -1, 1))).astype(np.float32)


_SMOOTH = _smooth(4)


def _background(rng) -> UInt8[np.ndarray, "64 64 3"]:
  """A dark, smooth, faintly coloured texture."""
  cells = rng.uniform(10, 30) + rng.uniform(-8, 8, (3, 4, 4))
  return (_SMOOTH @ cells @ _SMOOTH.T).transpose(1, 2, 0).astype(np.uint8)


# --- draw: from a plan to pixels and ground truth ---


@dataclasses.dataclass(frozen=True)
class _Patch:
  """A mask laid on the pixel grid: in every frame of `span`, an alpha patch and the (row, column) where it begins."""

  alpha: Float[np.ndarray, "f h w"]
  at: Int[np.ndarray, "2 f"]
  span: slice

  def window(self, image: np.ndarray, channels: int):
    """View and index that read or write the patch in images of [F, 64, 64 * channels]."""
    _, height, width = self.alpha.shape
    view = sliding_window_view(image[self.span], (height, width * channels), axis=(1, 2), writeable=True)
    return view, (np.arange(len(self.alpha)), self.at[0], self.at[1] * channels)


def _lay(mask: Float[np.ndarray, "h w"], path: Float[np.ndarray, "F 2"], span: slice) -> _Patch:
  """Places a mask at fractional positions by bilinear weights, one matrix product an axis; the frame's edge cuts it."""
  weights, at = [], []
  for position, cells in zip(path[span].T[::-1], mask.shape, strict=True):
    width = min(cells + 1, SIZE)
    begin = np.clip(np.floor(position), 0, SIZE - width)
    offset = (begin - position).astype(np.float32)[:, None, None]
    steps = np.arange(width, dtype=np.float32)[:, None] - np.arange(cells, dtype=np.float32)
    weights.append(np.maximum(1 - np.abs(offset + steps), 0))
    at.append(begin.astype(np.int64))
  rows, columns = weights
  return _Patch(rows @ (mask @ columns.transpose(0, 2, 1)), np.stack(at), span)


def _rounded_box(shape: tuple[int, int], radius: float = 3.0) -> Float[np.ndarray, "h w"]:
  """Alpha of a box with round, antialiased corners; exactly 1 inside."""
  y, x = (np.maximum(np.abs(np.arange(n) - (n - 1) / 2) - (n / 2 - radius), 0) for n in shape)
  return np.clip(radius + 0.5 - np.hypot(y[:, None], x), 0, 1).astype(np.float32)


def _paint(frames: UInt8[np.ndarray, "F 64 192"], patch: _Patch, colour):
  """Blends a colour into the frames through the patch's alpha."""
  view, index = patch.window(frames, 3)
  alpha = np.repeat(patch.alpha, 3, axis=2)
  under = view[index].astype(np.float32)
  over = np.tile(np.asarray(colour, np.float32), patch.alpha.shape[2])
  over = (over - under) * alpha
  over += under
  over += 0.5
  view[index] = over.astype(np.uint8)


def _visibility(digits: list[_Patch], cover: _Patch | None, ink: list[float], frames: int) -> Float[np.ndarray, "F n"]:
  """Share of every digit's ink that nothing in front hides; later digits are in front of earlier ones."""
  clear = np.ones((frames, SIZE, SIZE), np.float32)
  if cover is not None:
    view, index = cover.window(clear, 1)
    view[index] = 1 - cover.alpha
  share = np.zeros((frames, len(digits)), np.float32)
  for i in reversed(range(len(digits))):
    view, index = digits[i].window(clear, 1)
    seen = view[index]
    share[:, i] = np.einsum("fhw,fhw->f", digits[i].alpha, seen) / ink[i]
    if i:
      view[index] = seen * (1 - digits[i].alpha)
  return np.where(share > 1 - 1e-4, 1, share).astype(np.float32)


def _draw(plan: _Plan) -> Clip:
  frames, n = plan.paths.shape[:2]
  everywhere = slice(0, frames)
  masks = [handwriting.glyph(plan.split, sample, size) for sample, size in zip(plan.samples, plan.sizes, strict=True)]
  digits = [_lay(mask, plan.paths[:, i], everywhere) for i, mask in enumerate(masks)]
  cover = plan.cover and _lay(_rounded_box(plan.cover.shape), plan.cover.path, plan.cover.span)

  video = np.repeat(plan.background.reshape(1, SIZE, 3 * SIZE), frames, 0)
  for patch, colour in zip(digits, plan.colours, strict=True):
    _paint(video, patch, COLOURS[colour])
  if cover is not None:
    _paint(video, cover, (plan.cover.grey,) * 3)
  video = video.reshape(frames, SIZE, SIZE, 3)
  if plan.line is not None:
    lit = np.clip(plan.line[:, None] - np.arange(SIZE), 0, 1).astype(np.float32)[:, None, :, None]
    rows = video[:, _FLOOR:]
    video[:, _FLOOR:] = rows + (_LINE_COLOUR - rows.astype(np.float32)) * lit + 0.5

  visibility = _visibility(digits, cover, [float(mask.sum()) for mask in masks], frames)
  hidden = np.full((n, 2), -1)
  start, stop = plan.hide or (0, -1)
  if plan.hide:
    seen = np.flatnonzero(visibility[:, 0])
    middle = first_frame(start)
    hidden[0] = seen[seen < middle].max() + 1, seen[seen > middle].min()
  labels = handwriting.load(plan.split)[1][list(plan.samples)]
  edges = plan.paths[..., None, :] + np.array([0, 1])[:, None] * np.array(plan.sizes)[:, None, None]
  return Clip(
    frames=video,
    caption=_caption(plan, labels),
    labels=labels,
    colours=plan.colours,
    boxes=edges.reshape(frames, n, 4).astype(np.float32),
    visibility=visibility,
    entry_chunk=np.array(plan.entry),
    hidden=hidden,
    hidden_chunks=stop - start if plan.hide else 0,
    prefix_chunks=start,
    reveal_chunk=stop,
  )


def _caption(plan: _Plan, labels) -> str:
  """Names every digit, "a red 3 and a blue 7", or the colours, "a red digit and a bar", or nothing; never the cover."""
  if plan.naming == 2:
    return ""
  things = [f"a {plan.colours[i]} {'digit' if plan.naming else labels[i]}" for i in plan.order]
  bar = plan.cover is not None and plan.hide is None
  return " and ".join(things + ["a bar"] * bar)
