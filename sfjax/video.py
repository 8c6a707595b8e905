"""Video files: frames stream into an H.264 file, and out of any file that PyAV reads; a contact sheet for the eye."""

import contextlib
import pathlib
from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageOps

from sfjax.errors import UserError
from sfjax.runlog import replacing


class VideoWriter:
  """Streams frames into an mp4; the file takes its name when it is complete, and vanishes on an error.

  Args:
    path: of the mp4. fps: frames per second. scale: nearest-neighbour enlargement.

  Raises:
    UserError: on entering, if the file cannot be written.
    ValueError: on leaving, if no frame came.
  """

  def __init__(self, path, fps: float, scale: int = 1):
    self._path, self._fps, self._scale = pathlib.Path(path), Fraction(fps).limit_denominator(1001), scale
    self._box = self._stream = None

  def __enter__(self):
    with contextlib.ExitStack() as stack:
      self._part = stack.enter_context(replacing(self._path))
      stack.push(self._finish)
      self._stack = stack.pop_all()
    return self

  def write(self, frames: UInt8[np.ndarray, "F h w 3"]) -> None:
    """Encodes frames; raises ValueError unless rows and columns are even and the same in every call."""
    s = self._scale
    for frame in np.asarray(frames):
      frame = frame.repeat(s, 0).repeat(s, 1)
      h, w = frame.shape[:2]
      if self._box is None:
        if h % 2 or w % 2:
          raise ValueError(f"frames: {h}x{w}; H.264 wants even rows and columns")
        self._box = av.open(str(self._part), "w", format="mp4")
        self._stream = self._box.add_stream("libx264", rate=self._fps, options={"crf": "14"})
        self._stream.height, self._stream.width = h, w
        self._stream.pix_fmt = "yuv420p"
      if (h, w) != (self._stream.height, self._stream.width):
        raise ValueError(f"frames: {h}x{w}; the video began with {self._stream.height}x{self._stream.width}")
      self._box.mux(self._stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

  def _finish(self, kind, *_):
    if self._box is None:
      if kind is None:
        raise ValueError(f"{self._path}: no frame was written")
      return
    with self._box:
      if kind is None:
        self._box.mux(self._stream.encode())

  def __exit__(self, *exc):
    return self._stack.__exit__(*exc)


def _fit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
  return np.asarray(ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS))


def read_video(path, fps: float, size: tuple[int, int], flag: str = "--video") -> UInt8[np.ndarray, "F h w 3"]:
  """A whole file at a frame rate (nearest frame in time) and size (centre crop).

  Raises:
    UserError: missing, unreadable, or without a frame.
  """
  if not pathlib.Path(path).is_file():
    raise UserError(f"{flag}: {path} is not a file")
  times, frames = [], []
  try:
    with av.open(str(path)) as box:
      for frame in box.decode(video=0):
        times.append(frame.time if frame.time is not None else len(times) / 25)
        frames.append(_fit(frame.to_image(), size))
  except (av.FFmpegError, IndexError, ValueError) as e:
    raise UserError(f"{flag}: {path} cannot be decoded as a video ({type(e).__name__})") from e
  if not frames:
    raise UserError(f"{flag}: {path} has no frames")
  times = np.maximum.accumulate(np.asarray(times) - times[0])
  wanted = np.arange(int(np.floor(times[-1] * fps + 1e-6)) + 1) / fps
  nearest = np.searchsorted((times[1:] + times[:-1]) / 2, wanted)
  return np.stack([frames[i] for i in nearest])


def read_image(path, size: tuple[int, int], flag: str = "--image") -> UInt8[np.ndarray, "h w 3"]:
  """An image of any mode and shape at a size (centre crop). Raises UserError if it cannot be read."""
  try:
    with Image.open(path) as image:
      return _fit(_rgb(ImageOps.exif_transpose(image)), size)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
    raise UserError(f"{flag}: {path} cannot be read as an image") from e


def _rgb(image: Image.Image) -> Image.Image:
  """8-bit RGB: 16 bits scaled down (Pillow would cut them off at 255), transparent parts on white."""
  if image.mode.startswith("I"):
    image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
  if image.mode == "F":
    raise ValueError("floating-point pixels have no agreed range")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert("RGB")


class ContactSheet:
  """A grid of frames, one in `stride`, with their times; memory stays bounded because the stride doubles when full."""

  def __init__(self, fps: float, columns: int = 9, rows: int = 6, scale: int = 2):
    self._fps, self._columns, self._limit, self._scale = fps, columns, columns * rows, scale
    self._stride, self._seen, self._kept = 1, 0, []

  def add(self, frames: UInt8[np.ndarray, "F h w 3"]) -> None:
    """Frames in the order of the video."""
    for frame in np.asarray(frames):
      if self._seen % self._stride == 0:
        if len(self._kept) == self._limit:
          self._kept, self._stride = self._kept[::2], 2 * self._stride
        if self._seen % self._stride == 0:
          self._kept.append((self._seen, np.array(frame)))
      self._seen += 1

  def save(self, path) -> None:
    """Writes a PNG. Raises ValueError without frames, UserError if the file cannot be written."""
    if not self._kept:
      raise ValueError("contact sheet: no frames were added")
    h, w = (self._scale * n for n in self._kept[0][1].shape[:2])
    rows = -(-len(self._kept) // self._columns)
    sheet = Image.new("RGB", (self._columns * (w + 4), rows * (h + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (index, frame) in enumerate(self._kept):
      x, y = (i % self._columns) * (w + 4), (i // self._columns) * (h + 14)
      sheet.paste(Image.fromarray(frame).resize((w, h), Image.Resampling.NEAREST), (x, y))
      draw.text((x, y + h), f"{index / self._fps:.2f} s", fill="black")
    with replacing(path) as part:
      sheet.save(part, format="PNG")
