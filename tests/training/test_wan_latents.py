"""Videos as latents of a tiny Wan2.1: what is written, and training on it, causal and bidirectional."""

import dataclasses
import json

import av
import numpy as np
import pytest

import sample
from sfjax import checkpoint, latents, parts, rollout, training, wan
from sfjax.config import Config, DataConfig, Stage, load_config, to_dataclass
from sfjax.data.video_folder import VideoFolder
from sfjax.errors import UserError
from sfjax.wan_vae import WanVAE, from_uint8
from tests.wan.test_sample import folder, own_cache  # noqa: F401, fixtures

SIZE, FRAMES = (64, 96), 21  # 6 latents


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  """One of two clips, with a caption, and one of a clip and a half, without."""
  out, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
  for name, frames in (("a", 2 * FRAMES), ("b", FRAMES + 9)):
    with av.open(str(out / f"{name}.mp4"), "w") as container:
      stream = container.add_stream("libx264", rate=16)
      stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
      for _ in range(frames):
        block = rng.integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        for packet in stream.encode(av.VideoFrame.from_ndarray(block, format="rgb24")):
          container.mux(packet)
      for packet in stream.encode():
        container.mux(packet)
  (out / "a.txt").write_text("a cat &amp; a dog")
  return out


def write(folder, videos, out, *flags):  # noqa: F811
  line = ["--checkpoint", folder, "--videos", videos, "--out", out, "--latents", 6, "--batch", 2]
  latents.main([str(x) for x in (*line, *flags)])


@pytest.fixture(scope="module")
def clips(folder, videos, tmp_path_factory):  # noqa: F811
  out = tmp_path_factory.mktemp("latents") / "whole"
  write(folder, videos, out)
  return out


def configured(folder, clips, variant, **model):  # noqa: F811
  """configs/wan_1_3b.py:VARIANT at the tiny model's sizes."""
  config = to_dataclass(Config, load_config(f"configs/wan_1_3b.py:{variant}"))
  own = to_dataclass(Config, checkpoint.load_config(folder))
  model = dict(dtype="float32", param_dtype="float32", remat=config.model.remat) | model
  sizes = dataclasses.replace(own.model, **model)
  stages = (Stage(1.0, chunks=6 // sizes.chunk_frames, batch=0),)
  train = dataclasses.replace(config.train, steps=2, stages=stages, lr=1e-3, warmup=0, threads=1, log_every=1)
  return dataclasses.replace(
    config,
    model=sizes,
    memory=own.memory if variant == "teacher_forcing" else config.memory,
    sampler=dataclasses.replace(config.sampler, steps=2),
    data=DataConfig(source="latents", path=str(clips)),
    train=dataclasses.replace(train, init=str(folder)),
  )


def test_they_are_what_the_vae_makes_of_the_clips(folder, videos, clips):  # noqa: F811
  config = configured(folder, clips, "teacher_forcing", dtype="bfloat16")
  read, half = latents.source(config, config.train.stages[0]), parts.around(config, folder)[1].vae
  whole = dataclasses.replace(half, dtype="float32", param_dtype="float32")
  codecs = [(WanVAE(sizes), wan.load_vae(folder, sizes)) for sizes in (half, whole)]
  frames = VideoFolder(videos, SIZE, 16.0, FRAMES)
  assert half.dtype == "bfloat16" and len(read) == len(frames) == 3
  assert read.captions == frames.captions == ["a cat &amp; a dog"] * 2 + [""]
  for i in range(3):
    encode = lambda codec, weights, i=i: np.asarray(codec.encode(weights, from_uint8(frames[i]["frames"][None]))[0])
    (same, exact), got = (encode(*codec) for codec in codecs), read[i]["latents"]
    assert got.dtype == np.float16 and got.shape == (6, 8, 12, 16) and read[i]["caption"] == read.captions[i]
    error = lambda x, exact=exact: np.linalg.norm(x - exact) / np.linalg.norm(exact)
    assert error(got) <= 1.1 * error(same) < 0.02  # as sampling on a GPU encodes a beginning, but for the order of sums
  assert np.abs(read[0]["latents"] - read[1]["latents"]).max() > 0.1


def test_parts_make_the_same_shards(folder, videos, clips, tmp_path):  # noqa: F811
  for part in ("1/2", "0/2"):
    write(folder, videos, tmp_path / "parts", "--part", part)
  files = sorted(f.name for f in clips.iterdir())
  assert files == ["latents-00000.array_record", "latents-00001.array_record", "latents.json"]
  for name in files:
    assert (tmp_path / "parts" / name).read_bytes() == (clips / name).read_bytes()


@pytest.mark.parametrize(("variant", "model"), [("teacher_forcing", {}), ("bidirectional", dict(chunk_frames=6))])
def test_training_on_them(folder, clips, tmp_path, variant, model):  # noqa: F811
  config = configured(folder, clips, variant, **model)
  assert config.model.remat == "full" and config.data.source == load_config("configs/wan_1_3b.py:sparse").data.source
  before = checkpoint.named(parts.load_model(folder, {"dit": rollout.abstract_params(config.model)}, "")["dit"])
  model = training.train(config, tmp_path / "run")
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 2 and all(np.isfinite(line["flow"]) and line["grad_norm"] > 0 for line in lines)
  after = checkpoint.named(wan.load_dit(model, config.model))
  moved = [name for name in before if np.any(np.asarray(after[name]) != np.asarray(before[name]))]
  assert len(moved) > len(before) // 2
  sample.main(["--checkpoint", str(model), "--prompt", "a boat", "--seconds", "0.5", "--out", str(tmp_path / "out")])
  assert (tmp_path / "out" / "00.mp4").stat().st_size > 0


def test_clips_that_do_not_fit_are_refused(folder, clips):  # noqa: F811
  config = configured(folder, clips, "teacher_forcing")
  with pytest.raises(UserError, match="config.train.stages: chunks 3, firsts 0; these clips have 6 latents"):
    latents.source(config, Stage(1.0, chunks=3, batch=1))
  other = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_size=(12, 12)))
  with pytest.raises(UserError, match=r"config.model: latents of \[12, 12, 16\]; those at .* are of \[8, 12, 16\]"):
    latents.source(other, Stage(1.0, chunks=2, batch=1))
  other = dataclasses.replace(config, data=DataConfig(source="latents", path="/nowhere"))
  with pytest.raises(UserError, match="'/nowhere' is no folder that sfjax.latents wrote: latents.json cannot be read"):
    training.train(other, clips.parent / "run")


@pytest.mark.parametrize(
  ("flags", "line"),
  [
    (["--latents", 0], "--latents: 0; want more than 0"),
    (["--fps", "nan"], "--fps: nan; want more than 0"),
    (["--part", "2/2"], "--part: '2/2'; want I/N, I from 0 to N - 1"),
    (["--videos", "/nowhere"], "/nowhere: no such folder"),
    (["--latents", 30], "no video is as long as one clip of 117 frames"),
    (["--checkpoint", "checkpoints/digits"], "--checkpoint: checkpoints/digits is no model of Wan2.1's latents"),
  ],
)
def test_flags_that_are_refused(folder, videos, tmp_path, flags, line, capsys):  # noqa: F811
  with pytest.raises(SystemExit):
    write(folder, videos, tmp_path / "out", *flags)
  assert line in capsys.readouterr().err and not (tmp_path / "out").exists()
