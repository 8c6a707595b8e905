"""Video files: what is written is what is read, a file appears whole or not at all, errors name the file."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from sfjax.errors import UserError
from sfjax.video import ContactSheet, VideoWriter, read_image, read_video


def clip(frames=20, h=48, w=64):
  """Smooth frames that change over time; frame i is recognisable by its brightness."""
  f, y, x = np.meshgrid(np.arange(frames), np.arange(h), np.arange(w), indexing="ij")
  rgb = np.stack([f * 200 / frames + 20, 60 + 2 * y, 40 + 2 * x], -1)
  return rgb.astype(np.uint8)


def psnr(a, b):
  return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_roundtrip(tmp_path):
  frames = clip()
  with VideoWriter(tmp_path / "a.mp4", 16) as writer:
    for part in np.split(frames, [1, 9]):
      writer.write(part)
      assert names(tmp_path) == [".a.mp4.part"]
  assert names(tmp_path) == ["a.mp4"]
  with av.open(str(tmp_path / "a.mp4")) as box:
    stream = box.streams.video[0]
    assert (stream.average_rate, stream.frames) == (16, 20)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
  back = read_video(tmp_path / "a.mp4", 16, (48, 64))
  assert back.shape == frames.shape and back.dtype == np.uint8
  assert min(psnr(a, b) for a, b in zip(frames, back, strict=True)) > 36


def test_fractional_rate(tmp_path):
  with VideoWriter(tmp_path / "a.mp4", 12.5) as writer:
    writer.write(clip(25))
  with av.open(str(tmp_path / "a.mp4")) as box:
    assert box.streams.video[0].average_rate == Fraction(25, 2)


def test_scale_is_nearest_neighbour(tmp_path):
  frames = np.random.default_rng(0).integers(0, 2, (3, 8, 10, 1), np.uint8).repeat(3, -1) * 255
  with VideoWriter(tmp_path / "a.mp4", 8, scale=4) as writer:
    writer.write(frames)
  back = read_video(tmp_path / "a.mp4", 8, (32, 40))
  assert psnr(back, frames.repeat(4, 1).repeat(4, 2)) > 25


@pytest.mark.parametrize(("fps", "want"), [(16, range(16)), (8, range(0, 16, 2)), (32, [i // 2 for i in range(31)])])
def test_resampling_takes_the_nearest_frame(tmp_path, fps, want):
  frames = clip(16)
  with VideoWriter(tmp_path / "a.mp4", 16) as writer:
    writer.write(frames)
  back = read_video(tmp_path / "a.mp4", fps, (48, 64))
  shown = [int(np.abs(frames[..., 0].mean((1, 2)) - f[..., 0].mean()).argmin()) for f in back]
  assert shown == list(want)


def test_centre_crop(tmp_path):
  frames = np.zeros((2, 32, 64, 3), np.uint8)
  frames[:, :, 16:48] = 255
  with VideoWriter(tmp_path / "a.mp4", 8) as writer:
    writer.write(frames)
  back = read_video(tmp_path / "a.mp4", 8, (16, 16))
  assert back.shape == (2, 16, 16, 3) and back[:, :, 1:-1].min() > 240


def test_exception_leaves_nothing(tmp_path):
  for frames in (clip(40), clip(0)):
    with pytest.raises(RuntimeError, match="boom"), VideoWriter(tmp_path / "a.mp4", 8) as writer:
      writer.write(frames)
      raise RuntimeError("boom")
    assert names(tmp_path) == []


def test_failure_keeps_the_old_file(tmp_path):
  (tmp_path / "a.mp4").write_text("old")
  with pytest.raises(ValueError, match="no frame"), VideoWriter(tmp_path / "a.mp4", 8):
    pass
  assert (tmp_path / "a.mp4").read_text() == "old" and names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("shapes", [[(3, 4)], [(4, 6), (4, 8)]])
def test_sizes(tmp_path, shapes):
  size = "x".join(map(str, shapes[-1]))
  with pytest.raises(ValueError, match=size), VideoWriter(tmp_path / "a.mp4", 8) as writer:
    for h, w in shapes:
      writer.write(np.zeros((1, h, w, 3), np.uint8))
  assert names(tmp_path) == []


def test_unwritable_folder_fails_on_entering(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file" / "sub" / "a.mp4", tmp_path / "absent" / "a.mp4"):
    with pytest.raises(UserError, match=f"{path}: cannot be written"):
      VideoWriter(path, 8).__enter__()


@pytest.mark.parametrize("content", ["absent", "empty", "text", "truncated", "sound", "png"])
def test_unreadable(tmp_path, content):
  path, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
  with VideoWriter(other, 8) as writer:
    writer.write(clip(4))
  if content == "sound":
    with wave.open(str(path), "wb") as f:
      f.setparams((1, 2, 8000, 0, "NONE", ""))
      f.writeframes(bytes(1600))
  elif content != "absent":
    path.write_bytes(
      {"empty": b"", "text": b"hello " * 99, "truncated": other.read_bytes()[:600]}.get(content, b"\x89PNG")
    )
  with pytest.raises(UserError, match=f"--video: {path}"):
    read_video(path, 8, (8, 8))
  with pytest.raises(UserError, match=f"--image: {path}"):
    read_image(path, (8, 8))


def test_image(tmp_path):
  pixels = np.zeros((20, 40, 3), np.uint8)
  pixels[:, 10:30] = (200, 100, 50)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  image = read_image(tmp_path / "a.png", (10, 10))
  assert image.shape == (10, 10, 3) and np.abs(image[:, 2:-2].astype(int) - (200, 100, 50)).max() <= 1
  data = (tmp_path / "a.png").read_bytes()
  refused = 0
  for cut in range(len(data)):
    (tmp_path / "b.png").write_bytes(data[:cut])
    try:
      assert np.array_equal(read_image(tmp_path / "b.png", (10, 10)), image)  # nothing but checksums was cut
    except UserError as error:
      refused += 1
      assert str(error) == f"--image: {tmp_path / 'b.png'} cannot be read as an image"
  assert refused > len(data) // 2


def test_camera_orientation(tmp_path):
  pixels = np.zeros((16, 16, 3), np.uint8)
  pixels[:8] = 255
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
  assert read_image(tmp_path / "a.png", (16, 16))[8:].min() == 255


@pytest.mark.parametrize(("columns", "rows"), [(3, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize("frames", [1, 5, 6, 7, 100])
def test_contact_sheet(tmp_path, columns, rows, frames):
  sheet, limit = ContactSheet(10, columns, rows, scale=1), columns * rows
  for frame in clip(frames, 40, 60):
    sheet.add(frame[None])
    assert len(sheet._kept) <= limit
  shown = [i for i, _ in sheet._kept]
  assert shown == list(range(0, frames, sheet._stride)) and len(shown) > limit // 2 - (frames < limit) * limit
  sheet.save(tmp_path / "s.png")
  with Image.open(tmp_path / "s.png") as image:
    pixels = np.asarray(image)
  assert names(tmp_path) == ["s.png"]
  assert np.array_equal(pixels[:40, :60], clip(frames, 40, 60)[0])
  assert (pixels[40:54, :60] < 128).any()  # the label


def test_contact_sheet_errors(tmp_path):
  sheet = ContactSheet(10)
  with pytest.raises(ValueError, match="no frames"):
    sheet.save(tmp_path / "s.png")
  sheet.add(clip(1))
  with pytest.raises(UserError, match="cannot be written"):
    sheet.save(tmp_path / "absent" / "s.png")


def test_images_of_any_mode(tmp_path):
  ramp = np.arange(0, 256, 16, dtype=np.uint8).repeat(4).reshape(1, -1).repeat(8, 0)  # 8 x 64
  want = read_as(tmp_path, Image.fromarray(ramp), "grey.png")
  for image, name in (
    (Image.fromarray(ramp).convert("RGB"), "rgb.png"),
    (Image.fromarray(ramp.astype(np.uint16) * 257), "sixteen.png"),
    (Image.fromarray(ramp).convert("RGB").quantize(64), "palette.png"),
    (Image.fromarray(np.stack([ramp] * 3 + [0 * ramp + 255], -1)), "opaque.png"),
  ):
    np.testing.assert_allclose(read_as(tmp_path, image, name).astype(int), want, atol=1, err_msg=name)
  clear = np.stack([0 * ramp] * 3 + [ramp], -1)  # black, from clear to opaque
  np.testing.assert_allclose(read_as(tmp_path, Image.fromarray(clear), "clear.png").astype(int), 255 - want, atol=2)
  assert read_as(tmp_path, Image.fromarray(ramp > 100), "bits.png").max() == 255
  with pytest.raises(UserError, match=r"float.tiff cannot be read as an image"):
    read_as(tmp_path, Image.fromarray(ramp.astype(np.float32)), "float.tiff")


def read_as(folder, image, name):
  image.save(folder / name)
  return read_image(folder / name, (8, 64))


def test_images_of_any_shape(tmp_path):
  for size in ((1, 300), (300, 1), (7, 5), (2000, 3)):
    assert read_as(tmp_path, Image.new("RGB", size, (9, 99, 199)), "x.png").shape == (8, 64, 3)
