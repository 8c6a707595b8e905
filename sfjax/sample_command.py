"""sample.py's work: flags to videos, contact sheets and run.json."""

import argparse
import json
import pathlib
import time

import jax
import numpy as np

from sfjax import checkpoint, sampling
from sfjax.config import to_dict
from sfjax.data.digits import chunk_of_frame
from sfjax.errors import UserError
from sfjax.runlog import latency, make_folder, peak_memory, run_record, write_json_atomic


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise UserError(message)


def parse(argv: list[str]) -> argparse.Namespace:
  """Flags, checked as far as they can be without a model."""
  p = _Parser(prog="sample.py", description="Samples videos; without flags, a short one from the shipped model.")
  p.add_argument("--checkpoint", default=str(sampling.SHIPPED), help="model folder (it carries its config)")
  p.add_argument("--prompt", action="append", help="what the video shows; repeat for several videos")
  p.add_argument("--prompt_file", help="a text file, one prompt a line")
  p.add_argument("--prompt_schedule", help='prompts that change on the way: "0: a red 3; 2.5: a blue 7"')
  p.add_argument("--seconds", type=float, default=5.0)
  p.add_argument("--steps", type=int, help="denoising steps per chunk")
  p.add_argument("--guidance", type=float, help="classifier-free guidance weight; 1 is off")
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--out", default="out", help="folder for video, contact sheet and run.json")
  p.add_argument("--attention", default="sparse", choices=sampling.ATTENTION)
  p.add_argument("--image", help="first frame")
  p.add_argument("--video", help="a video to continue; it opens the result")
  p.add_argument("--save_state", help="file for the rollout's state, to go on later")
  p.add_argument("--continue_state", help="file written by --save_state")
  p.add_argument("--device", choices=("cpu", "gpu"), help="default: a GPU if there is one")
  a = p.parse_args(argv)
  if not 0 < a.seconds <= 24 * 3600:
    raise UserError(f"--seconds: {a.seconds:g}; want more than 0")
  if not 0 <= a.seed < 2**31:
    raise UserError(f"--seed: {a.seed}; want 0..2147483647")
  if a.image and a.video:
    raise UserError("--image: not together with --video")
  if a.continue_state and (a.image or a.video):
    raise UserError("--continue_state: not together with --image or --video")
  a.prompts = _prompts(a)
  if (a.continue_state or a.save_state) and len(a.prompts) > 1:
    raise UserError("--save_state, --continue_state: one prompt at a time")
  return a


def _prompts(a) -> list[str]:
  prompts = list(a.prompt or [])
  if a.prompt_file:
    try:
      lines = pathlib.Path(a.prompt_file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
      raise UserError(f"--prompt_file: {a.prompt_file} cannot be read as text") from e
    found = [line.strip() for line in lines if line.strip()]
    if not found:
      raise UserError(f"--prompt_file: {a.prompt_file} is empty; want one prompt a line")
    prompts += found
  a.schedule = {}
  if a.prompt_schedule:
    if prompts:
      raise UserError("--prompt_schedule: not together with --prompt or --prompt_file")
    try:
      parts = [part.split(":", 1) for part in a.prompt_schedule.split(";") if part.strip()]
      a.schedule = {float(when): text.strip() for when, text in parts}
    except ValueError as e:
      raise UserError(f'--prompt_schedule: {a.prompt_schedule!r}; want "0: prompt; 2.5: prompt"') from e
    if 0 not in a.schedule or min(a.schedule) < 0:
      raise UserError("--prompt_schedule: the first prompt starts at 0 seconds")
    prompts = [a.schedule[0]]
  return prompts or ["a red 3 and a blue 7"]


def run(argv: list[str]) -> None:
  """Samples every prompt and writes NN.mp4, NN.png and run.json into --out."""
  a = parse(argv)
  if a.device:
    try:
      jax.config.update("jax_default_device", jax.devices(a.device)[0])
    except RuntimeError as e:
      raise UserError(f"--device: no {a.device} here; this machine has {jax.default_backend()}") from e
  from sfjax.video import ContactSheet, VideoWriter, read_image, read_video  # after the flags: it loads FFmpeg

  began = time.perf_counter()
  sampler = sampling.Sampler(a.checkpoint, a.attention, a.steps, a.guidance)
  sampler.encoder.tokens([*a.prompts, *a.schedule.values()])
  fps, prefix = sampler.fps, None
  if a.image:
    prefix = read_image(a.image, sampler.size)[None, None]
  if a.video:
    prefix = read_video(a.video, fps, sampler.size)[None]
  frames = max(1, round(a.seconds * fps))
  schedule = {chunk_of_frame(round(s * fps)): [text] for s, text in a.schedule.items() if s > 0}
  out = make_folder(a.out, "--out")
  videos = []
  for i, prompt in enumerate(a.prompts):
    memory = sampler.start([prompt], a.seed)
    if a.continue_state:
      memory = _load_state(a.continue_state, memory)
    times, sheet, start = [], ContactSheet(fps), time.perf_counter()
    first = None
    with VideoWriter(out / f"{i:02d}.mp4", fps, scale=4 if sampler.size[0] <= 128 else 1) as writer:
      stream = sampler.stream(memory, frames, a.seed, [i], prefix, schedule, times)
      for pixels, memory in stream:  # noqa: B007, the last memory is used below
        first = first or time.perf_counter() - start
        writer.write(pixels[0])
        sheet.add(pixels[0])
    total = time.perf_counter() - start
    sheet.save(out / f"{i:02d}.png")
    if a.save_state:
      checkpoint.save_arrays(a.save_state, checkpoint.flatten(dict(vars(memory))))
    videos.append(
      {
        "prompt": prompt,
        "frames": frames,
        "seconds": round(total, 3),
        "first_frame": round(first, 3),
        "fps_end_to_end": round(frames / total, 2),
        "chunk_times": latency(times) if times else None,
      }
    )
    print(f"{out / f'{i:02d}.mp4'}  {frames} frames in {total:.1f} s  {prompt!r}")
  held = {"slots_and_pooled": sum(np.prod(x.shape) * x.dtype.itemsize for x in (memory.k, memory.v, memory.pooled))}
  record = run_record(
    to_dict(sampler.config),
    seed=a.seed,
    videos=videos,
    kv_bytes={"predicted": sampler.kv_bytes, "measured": int(held["slots_and_pooled"])},
    peak_memory=peak_memory(),
    seconds_total=round(time.perf_counter() - began, 2),
  )
  write_json_atomic(out / "run.json", json.loads(json.dumps(record, default=str)))


def _load_state(path: str, like):
  arrays = checkpoint.load_arrays(path)
  for name, value in vars(like).items():
    if name not in arrays or arrays[name].shape != value.shape:
      raise UserError(f"--continue_state: {path} does not fit this model and --attention ({name})")
  return like.replace(**{name: jax.numpy.asarray(arrays[name]) for name in vars(like)})
