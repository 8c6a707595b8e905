"""A folder of videos as clips of one size and rate: any clip can be read alone, by its timestamps.

A file of s seconds gives floor(s x fps) frames, frame k being the decoded one nearest to k / fps seconds, and these are
cut into clips that do not overlap. Only clips asked for are decoded.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")
CAPTIONS = "captions.jsonl"


class DataError(ValueError):
  """A folder or file that cannot be used; one line that names it."""


@dataclasses.dataclass(frozen=True)
class _Video:
  path: pathlib.Path
  caption: str
  clips: int


class VideoFolder:
  """Clips of the videos below a folder, with captions.

  Captions come from `captions.jsonl`, one {"file": path below the folder, "caption": text} a line, else from a .txt
  beside the video, else they are empty. Videos shorter than one clip are skipped.
  """

  def __init__(self, path, size: tuple[int, int], fps: float, frames: int):
    """Lists the clips; reads the containers' durations, decodes nothing.

    Args:
      path: the folder, searched with its subfolders.
      size: (height, width) of a clip in pixels; videos are cropped about their centre to its shape.
      fps: frames a second.
      frames: frames of a clip.

    Raises:
      DataError: no folder, no videos, an unreadable one, captions of a missing file, or none as long as one clip.
      ValueError: size, fps or frames is not positive.
    """
    for name, value in (("size", min(size)), ("fps", fps), ("frames", frames)):
      if value <= 0:
        raise ValueError(f"{name}: {value} is not accepted; positive")
    self._size, self._fps, self._frames = tuple(size), fps, frames
    folder = pathlib.Path(path)
    if not folder.is_dir():
      raise DataError(f"{folder}: no such folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
      raise DataError(f"{folder}: no videos ({', '.join(s[1:] for s in SUFFIXES)})")
    captions = _read_captions(folder)
    lengths = [int(_duration(p) * fps + 0.1) for p in paths]  # some containers round to milliseconds
    self._videos = [
      _Video(p, _caption(p, captions), length // frames)
      for p, length in zip(paths, lengths, strict=True)
      if length >= frames
    ]
    if not self._videos:
      raise DataError(
        f"{folder}: no video is as long as one clip of {frames} frames at {fps} fps; "
        f"the longest, {paths[int(np.argmax(lengths))].name}, has {max(lengths)}"
      )
    self._ends = np.cumsum([video.clips for video in self._videos])

  def __len__(self) -> int:
    return int(self._ends[-1])

  @property
  def captions(self) -> list[str]:
    """Of all clips, in order; nothing is decoded."""
    return [video.caption for video in self._videos for _ in range(video.clips)]

  def __getitem__(self, index: int) -> dict:
    """{"frames": uint8 [frames, height, width, 3], "caption": str}.

    Raises:
      IndexError: no such clip.
      DataError: the video's data is damaged or ends before its container says.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"clip {index} of {len(self)}")
    which = int(np.searchsorted(self._ends, index, side="right"))
    video = self._videos[which]
    first = (index - (int(self._ends[which]) - video.clips)) * self._frames
    times = (first + np.arange(self._frames)) / self._fps
    return {"frames": _read(video.path, times, self._size), "caption": video.caption}


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise DataError(f"{path}: not text in UTF-8") from error


def _read_captions(folder: pathlib.Path) -> dict[pathlib.Path, str]:
  """Captions by path; empty where there is no list."""
  listing, captions = folder / CAPTIONS, {}
  if not listing.exists():
    return captions
  for number, line in enumerate(_read_text(listing).splitlines(), 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
      path, caption = folder / entry["file"], entry["caption"]
      if not isinstance(caption, str):
        raise TypeError
    except (ValueError, KeyError, TypeError) as error:
      raise DataError(f'{listing}: line {number} is not {{"file": path, "caption": text}}') from error
    if not path.is_file():
      raise DataError(f"{listing}: line {number} names {entry['file']}, which is not there")
    captions[path.resolve()] = caption
  return captions


def _caption(path: pathlib.Path, captions: dict[pathlib.Path, str]) -> str:
  beside = path.with_suffix(".txt")
  if path.resolve() in captions:
    return captions[path.resolve()]
  return _read_text(beside).strip() if beside.is_file() else ""


def _open(path: pathlib.Path):
  """The container and its video stream."""
  try:
    container = av.open(str(path))
  except (av.error.FFmpegError, OSError) as error:
    raise DataError(f"{path}: not a readable video ({type(error).__name__})") from error
  if not container.streams.video:
    container.close()
    raise DataError(f"{path}: has no video stream")
  stream = container.streams.video[0]
  stream.thread_type = "AUTO"
  return container, stream


def _start(stream) -> float:
  return float((stream.start_time or 0) * stream.time_base)


def _duration(path: pathlib.Path) -> float:
  """Seconds of the video stream, from its header; else from its packets' timestamps, still without decoding.

  The container's own duration is not used: sound may be longer than the picture.
  """
  container, stream = _open(path)
  with container:
    if stream.duration:
      return float(stream.duration * stream.time_base)
    tag = {key.upper(): value for key, value in stream.metadata.items()}.get("DURATION", "")  # Matroska and WebM
    if re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", tag):
      hours, minutes, seconds = tag.split(":")
      return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    try:
      shown = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    except av.error.FFmpegError as error:
      raise DataError(f"{path}: not a readable video ({type(error).__name__})") from error
    if not shown:
      raise DataError(f"{path}: has no frames")
    span = shown[-1] - shown[0]
    # the last frame lasts as long as the others
    return float((span + span / max(len(shown) - 1, 1)) * stream.time_base)


def _decode(path: pathlib.Path, seek_to: float) -> Iterator[tuple[float, av.VideoFrame]]:
  """Frames with their time in seconds from the start, from the last key frame at or before seek_to."""
  container, stream = _open(path)
  with container:
    if seek_to > 0:
      container.seek(int((seek_to + _start(stream)) / stream.time_base), stream=stream)
    for frame in container.decode(stream):
      if frame.pts is not None:
        yield float(frame.pts * stream.time_base) - _start(stream), frame


def _nearest(path: pathlib.Path, times: np.ndarray, seek_to: float) -> Iterator[av.VideoFrame]:
  """For every time the decoded frame nearest to it; ends early where the file does or seeking fails."""
  wanted, last_time, last = 0, None, None
  for time, frame in _decode(path, seek_to):
    if last is None and seek_to > 0 and time > times[0]:
      return  # the seek went past its aim
    while wanted < len(times) and last is not None and times[wanted] < (last_time + time) / 2:
      yield last
      wanted += 1
    if wanted == len(times):
      return
    gap = time - last_time if last is not None else 0.0
    last_time, last = time, frame
  # the last frame lasts as long as the one before; what lies beyond is missing
  while wanted < len(times) and last is not None and times[wanted] <= last_time + 1.5 * gap + 1e-3:
    yield last
    wanted += 1


def _read(path: pathlib.Path, times: np.ndarray, size: tuple[int, int]) -> UInt8[np.ndarray, "F h w 3"]:
  """Frames at the given times, in their final size."""
  problem = None
  for seek_to in dict.fromkeys((times[0], 0.0)):  # where a format cannot seek, decode from the beginning
    try:
      clip, previous = [], None
      for frame in _nearest(path, times, seek_to):
        clip.append(clip[-1] if frame is previous else _fit(frame, size))
        previous = frame
      if len(clip) == len(times):
        return np.stack(clip)
      problem = f"its frames end before {times[len(clip)]:.2f} s"
    except (av.error.FFmpegError, OSError) as error:
      problem = f"cannot be decoded ({type(error).__name__})"
  raise DataError(f"{path}: {problem}")


def _fit(frame: av.VideoFrame, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
  """Crops about the centre to the target's shape and resizes, antialiased."""
  height, width = size
  image = Image.fromarray(frame.to_ndarray(format="rgb24"))
  return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
