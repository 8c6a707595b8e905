"""sample.py end to end on a tiny model: what it writes, conditioning, states, schedules."""

import os
import subprocess
import sys

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sfjax
from sfjax import sampling
from sfjax.codec import DigitsCodec
from sfjax.memory import memory_bytes
from sfjax.video import VideoWriter

RED = ("--prompt", "a red 3")
BLUE = ("--prompt", "a blue 7")


def length(path):
  with av.open(str(path)) as box:
    return sum(1 for _ in box.decode(video=0))


def test_videos_contact_sheets_and_a_record(run_sample, config, model_folder, capsys):
  run = run_sample(*RED, *BLUE, "--seconds", 1.2, "--seed", 5)
  assert sorted(p.name for p in run.out.iterdir()) == ["00.mp4", "00.png", "01.mp4", "01.png", "run.json"]
  assert [length(run.out / name) for name in ("00.mp4", "01.mp4")] == [19, 19]  # 1.2 s at 16 fps, of 9 + 12 frames
  with av.open(str(run.out / "00.mp4")) as box:
    stream = box.streams.video[0]
    assert (stream.average_rate, stream.height, stream.width) == (16, 256, 256)
  with Image.open(run.out / "00.png") as sheet:
    assert sheet.size == (9 * (128 + 4), 3 * (128 + 14)) and len(sheet.getcolors(1 << 20)) > 100
  first, second = run.frames[:19], run.frames[19:]
  assert first.shape == (19, 64, 64, 3) and (first != second).mean() > 0.5

  record = run.record
  assert {"command", "config", "versions", "device", "seed", "videos", "kv_bytes", "peak_memory"} <= set(record)
  assert record["seed"] == 5 and record["config"]["model"]["dim"] == 64 and record["versions"]["jax"]
  assert record["kv_bytes"]["measured"] == record["kv_bytes"]["predicted"]["kv"]
  assert record["kv_bytes"]["predicted"] == memory_bytes(config.model, config.memory, batch=2)  # guidance doubles it
  assert [v["prompt"] for v in record["videos"]] == ["a red 3", "a blue 7"]
  for v in record["videos"]:
    assert v["frames"] == 19 and v["chunk_times"]["count"] == 2
    assert 0 < v["chunk_times"]["p50"] <= v["chunk_times"]["p95"] and 0 < v["first_frame"] <= v["seconds"]
  assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
    str(run.out / "00.mp4"),
    str(run.out / "01.mp4"),
  ]


def test_same_flags_same_bits_and_each_flag_counts(run_sample, tmp_path):
  (tmp_path / "prompts.txt").write_text("\n  a red 3 \n\n")
  flags = ("--seconds", 0.9, "--seed", 5)  # two chunks
  base = run_sample(*RED, *flags).frames
  np.testing.assert_array_equal(run_sample("--prompt_file", tmp_path / "prompts.txt", *flags, out="b").frames, base)
  for other in (("--seed", 6), BLUE):
    changed = run_sample(*(RED if other[0] != "--prompt" else ()), *flags, *other, out="c")
    assert (changed.frames != base).mean() > 0.05, other


def test_attention_and_sampler_flags(run_sample):
  flags = "--attention dense --guidance 1 --steps 1 --routing chunk --commit last --linear float8".split()
  run = run_sample(*RED, "--seconds", 0.1, *flags)
  memory, sampler = run.record["config"]["memory"], run.record["config"]["sampler"]
  assert (memory["window"], memory["persistent"], memory["top_k"]) == (7, 0, 1.0)
  assert (sampler["steps"], sampler["guidance"]) == (1, 1.0)
  assert (sampler["routing"], sampler["commit"]) == ("chunk", "last") and len(run.frames) == 2
  assert run.record["config"]["model"]["linear"] == "float8"
  assert run.record["device_bytes"]["measured"]["dit"] == run.record["device_bytes"]["predicted"]["dit"]
  assert run.record["kv_bytes"]["measured"] == run.record["kv_bytes"]["predicted"]["kv"]


def test_save_and_continue_equals_the_unbroken_video(run_sample, tmp_path):
  """Cut inside a chunk, so the first part goes on to the chunk's end; the prompt is remembered, or said again."""
  state, unbroken = tmp_path / "state.npz", run_sample(*BLUE, "--seconds", 45 / 16, "--seed", 3)
  begun = run_sample(*BLUE, "--seconds", 1, "--seed", 3, "--save_state", state, out="b")
  assert len(begun.frames) == length(begun.out / "00.mp4") == 21
  on = run_sample("--seconds", 1.5, "--seed", 3, "--continue_state", state, out="c")
  np.testing.assert_array_equal(np.concatenate([begun.frames, on.frames]), unbroken.frames)
  assert on.record["videos"][0]["prompt"] == "a blue 7"
  again = run_sample(*BLUE, "--seconds", 1, "--continue_state", state, out="d")  # the state tells the seed
  np.testing.assert_array_equal(again.frames, on.frames[:16])
  assert again.record["seed"] == 3
  for flags in ((*RED, "--seed", 3), ("--seed", 4)):
    fork = run_sample(*flags, "--seconds", 1, "--continue_state", state, out="e")
    assert (fork.frames != on.frames[:16]).mean() > 0.05


def test_float8_slots_are_saved_bit_for_bit(run_sample, refused_sample, tmp_path):
  flags, state = (*BLUE, "--seed", 3, "--guidance", 1, "--slots", "float8"), tmp_path / "state.npz"
  unbroken = run_sample(*flags, "--seconds", 33 / 16)
  begun = run_sample(*flags, "--seconds", 21 / 16, "--save_state", state, out="b")
  on = run_sample(*flags, "--seconds", 12 / 16, "--continue_state", state, out="c")
  np.testing.assert_array_equal(np.concatenate([begun.frames, on.frames]), unbroken.frames)
  assert unbroken.record["kv_bytes"]["measured"] == unbroken.record["kv_bytes"]["predicted"]["kv"]
  usual = run_sample(*BLUE, "--seed", 3, "--guidance", 1, "--seconds", 33 / 16, out="d")
  np.testing.assert_array_equal(usual.frames[:9], unbroken.frames[:9])  # the first chunk reads itself alone
  assert usual.record["kv_bytes"]["measured"] > 3.8 * unbroken.record["kv_bytes"]["measured"]  # of float32
  line = refused_sample("--continue_state", state, "--guidance", 1)
  assert "does not fit this model, --attention, --slots and --guidance: k_scale is [" in line


def test_a_schedule_changes_the_prompt_on_the_way(run_sample, tmp_path):
  flags = ("--seconds", 33 / 16, "--seed", 3)
  red = run_sample(*RED, *flags).frames
  changed = run_sample("--prompt_schedule", "1: a blue 7; 0: a red 3", *flags, out="b").frames
  np.testing.assert_array_equal(changed[:9], red[:9])  # frame 16 lies in the second chunk
  assert (changed[9:] != red[9:]).mean() > 0.05
  # The same change said when going on: seconds count from there.
  state = tmp_path / "state.npz"
  run_sample(*RED, "--seconds", 9 / 16, "--seed", 3, "--save_state", state, out="c")
  on = run_sample(
    "--prompt_schedule", "0: a red 3; 1: a blue 7", "--seconds", 1.5, "--seed", 3, "--continue_state", state, out="d"
  )  # fmt: skip
  np.testing.assert_array_equal(on.frames[:12], red[9:21])
  assert (on.frames[12:] != red[21:33]).mean() > 0.05


def test_a_first_image_and_a_video_open_the_result(run_sample, tmp_path):
  rng = np.random.default_rng(6)
  Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
  run = run_sample(*RED, "--seconds", 0.5, "--image", tmp_path / "a.png")
  np.testing.assert_array_equal(run.frames[0], np.asarray(Image.open(tmp_path / "a.png")))
  plain = run_sample(*RED, "--seconds", 0.5, out="b")
  assert (run.frames[1:] != plain.frames[1:]).mean() > 0.05

  smooth = np.clip(np.linspace(40, 200, 64)[:, None, None] + np.linspace(0, 50, 12)[:, None, None, None], 0, 255)
  with VideoWriter(tmp_path / "a.mp4", 16) as writer:
    writer.write(np.broadcast_to(smooth, (12, 64, 64, 3)).astype(np.uint8))
  run = run_sample(*RED, "--seconds", 1, "--video", tmp_path / "a.mp4", out="c")
  # 9 of the 12 frames fill whole latents; H.264 at crf 14 errs by a few levels.
  assert np.abs(run.frames[:9] - np.broadcast_to(smooth[:9], (9, 64, 64, 3))).max() < 12 and len(run.frames) == 16
  assert run.record["videos"][0]["chunk_times"]["count"] == 1  # the first chunk was given


def test_the_library_makes_the_video_of_the_command(run_sample, model_folder):
  run = run_sample(*RED, "--seconds", 0.9, "--seed", 2)
  np.testing.assert_array_equal(sfjax.sample("a red 3", 0.9, 2, model_folder), run.frames)


def test_presets_keep_the_kv_bytes_of_the_sparse_memory(config):
  own = memory_bytes(config.model, config.memory)["kv"]
  assert sampling.attention_preset(config, "sparse") == config.memory
  assert memory_bytes(config.model, sampling.attention_preset(config, "window"))["kv"] == own
  assert memory_bytes(config.model, sampling.attention_preset(config, "dense"))["kv"] > own / 0.58


def test_codec_round_trip_whole_and_in_chunks():
  codec = DigitsCodec()
  frames = np.random.default_rng(7).integers(0, 256, (2, 21, 16, 12, 3), np.uint8)
  latents = codec.encode(jnp.asarray(frames))
  assert latents.shape == (2, 6, 8, 6, codec.channels)
  np.testing.assert_array_equal(codec.decode(latents), frames)
  parts = [codec.decode(latents[:, :3]), codec.decode(latents[:, 3:], first=False)]
  np.testing.assert_array_equal(np.concatenate(parts, 1), frames)
  with pytest.raises(ValueError, match="want 1 \\+ 4 n frames"):
    codec.encode(jnp.asarray(frames[:, :20]))


def test_runs_as_a_program(model_folder, tmp_path):
  """Without the conveniences of a test's process: once, and with a device named."""
  command = [
    sys.executable,
    "sample.py",
    "--checkpoint",
    model_folder,
    "--seconds",
    "0.1",
    "--steps",
    "1",
    "--guidance",
    "1",
    "--device",
    "cpu",
  ]
  env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles faster
  done = subprocess.run([*map(str, command), "--out", str(tmp_path / "out")], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert length(tmp_path / "out" / "00.mp4") == 2 and "2 frames" in done.stdout
