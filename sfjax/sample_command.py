"""sample.py's work: flags to videos, contact sheets and run.json."""

import argparse
import hashlib
import itertools
import json
import math
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfjax import checkpoint, ledger, sampling
from sfjax.config import to_dict
from sfjax.errors import Parser, UserError, check_seed
from sfjax.flow import COMMITS, ROUTING
from sfjax.memory import KVMemory, held_bytes
from sfjax.model import LINEAR
from sfjax.routing import SLOTS
from sfjax.runlog import keep_programs, latency, make_folder, peak_memory, run_record, write_json_atomic


def parse(argv: list[str]) -> argparse.Namespace:
  """Flags, checked as far as they can be without a model."""
  p = Parser(prog="sample.py", description="Samples videos; without flags, a short one from the shipped model.")
  p.add_argument("--checkpoint", default=str(sampling.SHIPPED), help="model folder (it carries its config)")
  p.add_argument("--prompt", action="append", help="what the video shows; repeat for several videos")
  p.add_argument("--prompt_file", help="a text file, one prompt a line")
  p.add_argument("--prompt_schedule", help='prompts by seconds of this run: "0: a red 3; 2.5: a blue 7"')
  p.add_argument("--seconds", type=float, default=5.0)
  p.add_argument("--steps", type=int, help="denoising steps per chunk")
  p.add_argument("--guidance", type=float, help="classifier-free guidance weight; 1 is off")
  p.add_argument("--routing", choices=ROUTING, help="what a query reads is found in every step, or in a chunk's first")
  p.add_argument("--commit", choices=COMMITS, help="what is kept of a chunk: a clean pass's keys, or its last step's")
  p.add_argument("--slots", choices=SLOTS, help="K and V of earlier chunks in the model's dtype, or in half of 16 bit")
  p.add_argument(
    "--linear", choices=LINEAR, help="products with a layer's weights in the model's dtype, or in 8-bit floats"
  )
  p.add_argument("--seed", type=int, help="default: 0, or that of --continue_state")
  p.add_argument("--out", default="out", help="folder for video, contact sheet and run.json")
  p.add_argument("--attention", default="sparse", choices=sampling.ATTENTION)
  p.add_argument(
    "--tiny_decoder", metavar="FILE", help="decode Wan2.1's latents by TAEHV's taew2_1.pth: faster, coarser"
  )
  p.add_argument("--image", help="first frame")
  p.add_argument("--video", help="a video to continue; it opens the result")
  p.add_argument("--save_state", help="file for the state, to go on later; ends with a whole chunk")
  p.add_argument("--continue_state", help="file written by --save_state")
  p.add_argument("--devices", type=int, default=1, help="of this machine, to share every chunk's tokens: for speed")
  p.add_argument("--decode_apart", action="store_true", help="decode on one device more, beside the next chunk")
  p.add_argument("--device", choices=("cpu", "gpu"), help="default: a GPU if there is one")
  a = p.parse_args(argv)
  for flag in ("prompt_file", "out", "tiny_decoder", "image", "video", "save_state", "continue_state"):
    if getattr(a, flag) == "":
      raise UserError(f"--{flag}: ''; want a name")
  if not 0 < a.seconds <= sampling.LONGEST:
    raise UserError(f"--seconds: {a.seconds:g}; want more than 0 and at most {sampling.LONGEST}")
  if a.seed is not None:
    check_seed(a.seed)
  if a.guidance is not None and not 0 <= a.guidance < math.inf:
    raise UserError(f"--guidance: {a.guidance:g}; want 0 or more")
  if a.image and a.video:
    raise UserError("--image: not together with --video")
  if a.continue_state and (a.image or a.video):
    raise UserError("--continue_state: not together with --image or --video")
  a.prompts = _prompts(a)
  if (a.continue_state or a.save_state) and len(a.prompts) > 1:
    raise UserError("--save_state, --continue_state: one prompt at a time")
  if a.save_state:
    _prove_writable(pathlib.Path(a.save_state))
  return a


def _prove_writable(path: pathlib.Path) -> None:
  if (path.exists() and not path.is_file()) or not path.parent.is_dir():
    raise UserError(f"--save_state: {path} is not a file in a folder that exists")
  try:
    with tempfile.TemporaryFile(prefix=f".{path.name}.", dir=path.parent):
      pass
  except OSError as e:
    raise UserError(f"--save_state: {path} cannot be written ({e.strerror})") from e


def _prompts(a) -> list[str]:
  """One prompt for each video; sets `a.texts`, all texts by the flag they came with, and `a.schedule`."""
  a.texts, a.schedule = {"--prompt": list(a.prompt or [])}, {}
  if a.prompt_file:
    try:
      lines = pathlib.Path(a.prompt_file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
      raise UserError(f"--prompt_file: {a.prompt_file} cannot be read as text") from e
    a.texts["--prompt_file"] = [line.strip() for line in lines if line.strip()]
    if not a.texts["--prompt_file"]:
      raise UserError(f"--prompt_file: {a.prompt_file} is empty; want one prompt a line")
  prompts = sum(a.texts.values(), [])
  if a.prompt_schedule is not None:
    if prompts:
      raise UserError("--prompt_schedule: not together with --prompt or --prompt_file")
    try:
      parts = [part.split(":", 1) for part in a.prompt_schedule.split(";") if part.strip()]
      timed = [(float(when), text.strip()) for when, text in parts]
    except ValueError as e:
      raise UserError(f'--prompt_schedule: {a.prompt_schedule!r}; want "0: prompt; 2.5: prompt"') from e
    a.schedule = dict(timed)
    if 0 not in a.schedule or not all(0 <= s < math.inf for s in a.schedule):
      raise UserError("--prompt_schedule: want times of 0 seconds or more, the first prompt at 0")
    if len(a.schedule) < len(timed):
      twice = next(s for i, (s, _) in enumerate(timed) if s in dict(timed[:i]))
      raise UserError(f"--prompt_schedule: {twice:g} is there twice; want one prompt for each time")
    a.texts["--prompt_schedule"] = list(a.schedule.values())
    prompts = [a.schedule[0]]
  return prompts or ["a red 3 and a blue 7"]


def run(argv: list[str]) -> None:
  """Samples every prompt and writes NN.mp4, NN.png and run.json into --out."""
  a = parse(argv)
  if a.device == "cpu":
    jax.config.update("jax_platforms", "cpu")  # before anything asks for a device, so that no part sees a GPU
  try:
    jax.devices(a.device)
  except RuntimeError as e:
    raise UserError(f"--device: no {a.device} here; this machine has {jax.default_backend()}") from e
  from sfjax.video import ContactSheet, VideoWriter, read_image, read_video  # after the flags: it loads FFmpeg

  began = time.perf_counter()
  keep_programs()
  overrides = {name: getattr(a, name) for name in ("steps", "guidance", "routing", "commit")}
  low = {"slots": a.slots, "linear": a.linear}
  sampler = sampling.Sampler(a.checkpoint, a.attention, a.tiny_decoder, a.devices, a.decode_apart, **low, **overrides)
  for flag, texts in a.texts.items():
    sampler.parts.check(texts, flag)
  sampler.text(sum(a.texts.values(), []) or a.prompts)  # together: an encoder loaded for new prompts is loaded once
  fps, prefix, state, decoded, seed = sampler.fps, None, None, None, a.seed or 0
  if a.image:
    prefix = read_image(a.image, sampler.size)[None, None]
  if a.video:
    prefix = read_video(a.video, fps, sampler.size)[None]
  if a.continue_state:
    fresh = sampler.start(a.prompts, seed)
    state, decoded, told, made = _load_state(a.continue_state, fresh, sampler.parts.start(1))
    _check_made(a.continue_state, made, sampler)
    if a.seed is None:
      seed = made.get("seed", 0)
    if any(a.texts.values()):  # another prompt, or the same one again
      state = state.with_text(fresh.text_kv)
    else:
      a.prompts = [told]
  done = int(state.chunk[0]) if state else 0
  behind = sampler.first_frame(done)  # frames of the video that are made already
  frames = max(1, round(a.seconds * fps))
  if a.save_state:  # what the state knows is in the video, so that nothing is lost between the two
    frames = sampler.first_frame(sampler.chunk_of_frame(behind + frames - 1) + 1) - behind
  if a.video and sampling.usable(prefix.shape[1]) >= frames:
    told = f"{a.video} lasts {prefix.shape[1] / fps:g} s"
    raise UserError(f"--video: {told}; want less than --seconds {a.seconds:g}, so that it is continued")
  schedule = _schedule(a, sampler, behind, frames)
  out = make_folder(a.out, "--out")
  videos = []
  for i, prompt in enumerate(a.prompts):
    memory = state or sampler.start([prompt], seed)
    sheet, start, first = ContactSheet(fps), time.perf_counter(), None
    with VideoWriter(out / f"{i:02d}.mp4", fps, scale=4 if sampler.size[0] <= 128 else 1) as writer:
      stream = sampler.stream(memory, frames, seed, [i], prefix, schedule, decoded)
      for pixels in stream:
        first = first or time.perf_counter() - start
        writer.write(pixels[0])
        sheet.add(pixels[0])
    total, times, memory = time.perf_counter() - start, stream.seconds, stream.memory
    sheet.save(out / f"{i:02d}.png")
    if a.save_state:
      (last,) = [[prompt], *schedule.values()][-1]
      made = _identity(sampler) | {"attention": a.attention, "seed": seed}
      told = {"prompt": np.array(last), "made": np.array(json.dumps(made))}
      checkpoint.save_arrays(a.save_state, checkpoint.flatten(dict(vars(memory)) | {"codec": stream.decoded}) | told)
    videos.append(
      {
        "prompt": prompt,
        "frames": frames,
        "seconds": round(total, 3),
        "first_frame": round(first, 3),
        "fps_end_to_end": round(frames / total, 2),
        "fps_denoiser": round(sampler.chunk_length / np.median([t for t, _ in times[1:] or times]), 2)
        if times
        else None,
        "chunk_times": latency([t for _, t in times]) if times else None,
      }
    )
    print(f"{out / f'{i:02d}.mp4'}  {frames} frames in {total:.1f} s  {prompt!r}")
  record = run_record(
    to_dict(sampler.config),
    seed=seed,
    devices=a.devices,
    decode_apart=a.decode_apart,
    videos=videos,
    kv_bytes={"predicted": sampler.kv_bytes, "measured": held_bytes(memory)},
    device_bytes=ledger.told(sampler.parts, sampler.config, stream),
    peak_memory=peak_memory(),
    seconds_total=round(time.perf_counter() - began, 2),
  )
  write_json_atomic(out / "run.json", json.loads(json.dumps(record, default=str)))


def _schedule(a, sampler: sampling.Sampler, behind: int, frames: int) -> dict[int, list[str]]:
  """Chunk -> prompt from there on, but the first one's; `behind` frames are made already."""
  chunk = lambda s: sampler.chunk_of_frame(behind + round(s * sampler.fps))
  times = sorted(a.schedule)
  for before, s in itertools.pairwise(times):
    if round(s * sampler.fps) >= frames:
      raise UserError(f"--prompt_schedule: {s:g} is not before the video's end, --seconds {a.seconds:g}")
    if chunk(s) == chunk(before):
      told = f"{before:g} and {s:g} fall into the same chunk"
      raise UserError(
        f"--prompt_schedule: {told}; want one prompt for each, of {sampler.chunk_length / sampler.fps:g} s"
      )
  return {chunk(s): [a.schedule[s]] for s in times[1:]}


def _identity(sampler: sampling.Sampler) -> dict:
  """What a state belongs to: the model, wherever its folder and on whatever devices, and the memory."""
  config, dit = sampler.config, sampler.parts.dit
  told = hashlib.sha256(json.dumps(config.model.architecture, sort_keys=True).encode())
  for x in checkpoint.flatten({name: dit[name] for name in ("head", "patch_embedding")}).values():
    told.update(x.astype(jnp.bfloat16).tobytes())
  return {"model": told.hexdigest()[:16], "memory": to_dict(config.memory)}


def _check_made(path: str, made: dict, sampler: sampling.Sampler) -> None:
  """Raises UserError: the state at `path` tells that it was made by another model, or with another memory."""
  if not made:
    return
  own = _identity(sampler)
  if made["model"] != own["model"]:
    raise UserError(f"--continue_state: {path} was made by another model; want the --checkpoint it was made by")
  texts = lambda memory: {name: str(value) for name, value in memory.items()}
  wrong = checkpoint.first_difference(texts(made["memory"]), texts(own["memory"]))
  if wrong:
    raise UserError(f"--continue_state: {path} was made with --attention {made['attention']}, another memory: {wrong}")


def _load_state(path: str, like: KVMemory, codec) -> tuple[KVMemory, Any, str, dict]:
  """What --save_state saved: a memory shaped and typed as `like`, the codec's state as `codec`, the prompt, and what it was
  made by, empty where that was not told yet."""
  try:
    arrays = checkpoint.load_arrays(path)
  except UserError as e:
    raise UserError(f"--continue_state: {e}") from e
  prompt, made = (str(arrays.pop(name, default)) for name, default in (("prompt", ""), ("made", "{}")))
  wanted = dict(vars(like)) | {"codec": codec}
  if "k" in arrays and "cross_distinct" not in arrays:
    raise UserError(f"--continue_state: {path} was saved by an earlier version, whose memory knew less of its prompt")
  shapes = lambda leaves: {name: str(list(x.shape)) for name, x in leaves.items()}
  named = checkpoint.named(wanted)
  wrong = checkpoint.first_difference(shapes(arrays), shapes(named))
  if wrong:
    raise UserError(f"--continue_state: {path} does not fit this model, --attention, --slots and --guidance: {wrong}")
  found = [
    checkpoint.placed(arrays[name].astype(x.dtype), x.sharding if x.committed else None) for name, x in named.items()
  ]
  tree = jax.tree.unflatten(jax.tree.structure(wanted), found)
  return like.replace(**{name: tree[name] for name in vars(like)}), tree["codec"], prompt, json.loads(made)
