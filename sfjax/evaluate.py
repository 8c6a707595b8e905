"""Measures models on generated videos: python -m sfjax.evaluate --arm NAME=DIR --task prompt|memory --out DIR.

Every arm gets the same prompts, clips and noise. Results: DIR/evaluation.json, contact sheets, a markdown table on stdout.
"""

import argparse
import math
import re
import sys
import time

from sfjax.errors import Parser, UserError, check_seed, command

TASKS = ("prompt", "memory")


def parse(argv: list[str]) -> argparse.Namespace:
  """Flags, checked as far as they can be without a model. Raises UserError."""
  from sfjax import instrument, sampling
  from sfjax.data.digits import DigitsConfig, chunks_for
  from sfjax.evaluation.interventions import INTERVENTIONS

  p = Parser(prog="python -m sfjax.evaluate", description=__doc__.splitlines()[0])
  p.add_argument(
    "--arm",
    action="append",
    metavar="NAME=DIR[,KEY=VALUE]...",
    help="a model folder under a name; repeat for several. Keys: attention (sparse, window, dense), the sampler's "
    "routing (step, chunk) and commit (clean, last), the model's linear (dtype, float8), and any key of the memory, as in "
    "importance=random. The first arm is what the others are compared with. Default: the shipped model",
  )
  p.add_argument("--task", choices=TASKS, default="prompt", help="digits named by a prompt, or hidden in a real clip")
  p.add_argument("--seconds", type=float, nargs="+", default=[5.0], help="prompt task: horizons, as in 5 20 60")
  p.add_argument("--hide", type=int, nargs="+", help="memory task: chunks a digit is hidden for; default: 3 9 18")
  p.add_argument(
    "--intervene", nargs="+", default=[], choices=INTERVENTIONS, help="memory task: take P away, or swap it"
  )
  p.add_argument("--videos", type=int, default=256, help="of every arm and condition; even in the memory task")
  p.add_argument("--batch", type=int, default=64, help="videos side by side; even in the memory task")
  p.add_argument("--steps", type=int, help="denoising steps a chunk")
  p.add_argument("--guidance", type=float, help="classifier-free guidance weight; 1 is off")
  p.add_argument("--seed", type=int, default=0, help="of clips and noise")
  p.add_argument("--classifier", default=str(instrument.SHIPPED), help="the instrument's npz file")
  p.add_argument("--out", default="out/evaluation", help="folder for evaluation.json and contact sheets")
  a = p.parse_args(argv)
  a.arm = a.arm or [f"shipped={sampling.SHIPPED}"]
  a.batch = min(a.batch, a.videos)
  for name in ("videos", "batch"):
    value = getattr(a, name)
    if value < 1 or a.task == "memory" and value % 2:
      raise UserError(f"--{name}: {value}; want {'an even number, 2 or more' if a.task == 'memory' else '1 or more'}")
  check_seed(a.seed)
  for seconds in a.seconds:
    if not 0.1 <= seconds <= 3600:
      raise UserError(f"--seconds: {seconds:g}; want 0.1 to 3600")
  if a.guidance is not None and not 0 <= a.guidance < math.inf:
    raise UserError(f"--guidance: {a.guidance:g}; want 0 or more")
  for flag in ("hide", "intervene"):
    if getattr(a, flag) and a.task != "memory":
      raise UserError(f"--{flag}: only with --task memory")
  a.hide = a.hide or [3, 9, 18]
  for hide in a.hide:
    try:
      DigitsConfig(variant="memory", hide_fixed=hide, chunks=chunks_for(max(hide, 1)))
    except ValueError as e:
      raise UserError(f"--hide: {hide}; want {str(e).rpartition('; ')[2]}") from e
  names = [text.partition("=")[0] for text in a.arm]
  if len({*names, "real"}) <= len(names):
    raise UserError(f"--arm: the names {', '.join(names)} must differ from each other and from real")
  return a


def run(argv: list[str]) -> None:
  """Evaluates the arms and writes DIR/evaluation.json and contact sheets."""
  a = parse(argv)
  from tqdm import tqdm

  from sfjax import instrument
  from sfjax.config import to_dict
  from sfjax.data.digits import FPS, SIZE
  from sfjax.evaluation import report, tasks
  from sfjax.evaluation.arms import load_arm
  from sfjax.runlog import make_folder, peak_memory, run_record, write_json_atomic
  from sfjax.video import ContactSheet

  began = time.perf_counter()
  classifier, measured = instrument.load(a.classifier)
  arms = [load_arm(text, a.steps, a.guidance) for text in a.arm]
  for arm in arms:
    if arm.sampler.size != (SIZE, SIZE) or arm.sampler.fps != FPS:
      raise UserError(f"--arm {arm.name}: not a model of digits, {SIZE}x{SIZE} pixels at {FPS} frames a second")
    frames = arm.config.model.chunk_frames
    if a.task == "memory" and frames != 3:
      raise UserError(
        f"--arm {arm.name}: chunks of {frames} latents; --task memory wants a model whose chunks are of 3"
      )
  out = make_folder(a.out, "--out")

  def show(condition, row, videos):
    for i, frames in enumerate(videos):
      sheet = ContactSheet(FPS)
      sheet.add(frames)
      sheet.save(out / (re.sub(r"[^\w.-]+", "_", f"{condition} {row} {i}") + ".png"))

  if a.task == "prompt":
    chunks = sum(tasks.prompt_chunks(arm, a.seconds) for arm in arms)
  else:
    chunks = sum(tasks.memory_chunks(hide, arm, a.intervene) for hide in a.hide for arm in arms)
  with tqdm(total=chunks * -(-a.videos // a.batch), unit="chunk", disable=None) as bar:
    plan = tasks.Plan(a.videos, a.batch, a.seed, show, bar.update)
    if a.task == "prompt":
      scores = tasks.prompt_task(plan, arms, classifier, a.seconds)
    else:
      scores = tasks.memory_task(plan, arms, classifier, a.hide, a.intervene)
  record = run_record(
    {"flags": vars(a), "arms": {arm.name: to_dict(arm.config) for arm in arms}},
    instrument=measured,
    results=report.summary(scores, arms[0].name),
    seconds=round(time.perf_counter() - began, 1),
    peak_memory=peak_memory(),
  )
  write_json_atomic(out / "evaluation.json", record)
  print(report.markdown(scores, arms[0].name))


@command
def main(argv: list[str]) -> None:
  """The command."""
  run(argv)


if __name__ == "__main__":
  main(sys.argv[1:])
