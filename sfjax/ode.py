"""A teacher's trajectories: python -m sfjax.ode --checkpoint TEACHER --out DIR --pairs N; and training a student on them.

A converted folder of Wan2.1 is a teacher of clips of 21 latents, asked by the prompts of a file (--prompts).

The teacher solves its flow from noise to a clip, with guidance, in many steps; kept are the clip and the states at the few
noise levels that a student will visit. The student, its real memory switched on, learns to name the clip from each of these:
it can then take few steps, and needs no guidance. (self_forcing section 4.1)

Letters: B clips, K levels, T latent frames, n chunks, F latent frames of a chunk, h, w, C a latent frame.
"""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sfjax import captions, distill, teacher_forcing
from sfjax.checkpoint import load_config
from sfjax.config import Config, Stage, to_dataclass
from sfjax.data import records
from sfjax.data.loader import PromptFile, Prompts, Source
from sfjax.errors import Parser, UserError, check_seed, command
from sfjax.flow import SamplerConfig, to_x0
from sfjax.latents import fitting
from sfjax.objective import clip_keys, teacher_forced
from sfjax.parts import load_model, of_wan
from sfjax.runlog import keep_programs
from sfjax.wan import CLIP, MANY_STEPS, NEGATIVE

_KIND = "pairs"
abstract_model, fixed, state = teacher_forcing.abstract_model, teacher_forcing.fixed, teacher_forcing.state


def trajectory(
  denoise: distill.Denoiser, sampler: SamplerConfig, noise: Float[Array, "B T h w C"], keep: int
) -> Float[Array, "B K+1 T h w C"]:
  """States of Euler's method at `keep` of its steps' beginnings, evenly spread, and at its end."""
  sigmas = jnp.asarray(sampler.sigmas)

  def step(x, i):
    level = jnp.full(x.shape[:2], sigmas[i])
    return x + (sigmas[i + 1] - sigmas[i]) * (x - denoise(x, level)) / sigmas[i], None

  def stretch(x, steps):
    return jax.lax.scan(step, x, steps)[0], x

  end, starts = jax.lax.scan(stretch, noise, jnp.arange(sampler.steps).reshape(keep, -1))
  return jnp.moveaxis(jnp.concatenate([starts, end[None]]), 0, 1)


class Pairs(records.Records):
  """The trajectories in a folder: {"states": float16 [K+1,T,h,w,C], "caption": str}.

  Raises:
    UserError: see `records.Records`, or levels that are not those of the sampler.
  """

  def __init__(self, path: str, sampler: SamplerConfig):
    super().__init__(path, _KIND, "sfjax.ode")
    sigmas = self.card["sigmas"]
    if len(sigmas) != len(sampler.sigmas) or not np.allclose(sigmas, sampler.sigmas, atol=1e-6):
      raise UserError(
        f"config.sampler: its levels are {sampler.sigmas.tolist()}; {path} holds {sigmas}; "
        "want the same --shift and --levels there"
      )


def source(config: Config, stage: Stage) -> Source:
  """The trajectories at config.data.path. Raises UserError: see `Pairs` and `latents.fitting`."""
  pairs = Pairs(config.data.path, config.sampler)
  return fitting(config, stage, pairs, pairs[0]["states"].shape[1:])


def inputs(config: Config, batch: dict):
  """A batch of the loader as arrays: (states float16 [B,K+1,T,h,w,C], `captions.Text`, whose null prompt is empty)."""
  return batch["states"], captions.text(config, batch["caption"])


def loss(config: Config, stage: Stage, params: dict, inputs, key: Array, index):
  """Mean squared error of the clip that is named from a state, each chunk at a level of its own: (loss, metrics)."""
  model = config.model
  states, text = inputs
  states = states.astype(jnp.float32).reshape(*states.shape[:2], stage.chunks, model.chunk_frames, *states.shape[3:])
  clean, levels = states[:, -1], jnp.asarray(config.sampler.sigmas[:-1])
  keys = clip_keys(key, index)
  level = jax.vmap(lambda k: jax.random.randint(k, (stage.chunks,), 0, len(levels)))(keys)
  noisy = jnp.take_along_axis(states, level[:, None, :, None, None, None, None], 1)[:, 0]
  sigma = jnp.broadcast_to(levels[level][..., None], noisy.shape[:3])
  quiet = jnp.zeros_like(sigma[:, :-1])
  out, aux = teacher_forced(config, stage, params, clean[:, :-1], quiet, noisy, sigma, text.prompt, keys)
  error = ((to_x0(model, out, noisy, sigma) - clean) ** 2).mean()
  total = error + config.train.importance_weight * aux
  return total, {"loss": total, "x0_error": error, "importance": aux}


step = functools.partial(teacher_forcing.step, of=loss)


def _teacher(a) -> tuple[Config, str]:
  """The config of the folder `a.checkpoint` as a teacher's of whole clips, and what its guidance leads away from."""
  config = to_dataclass(Config, load_config(a.checkpoint), "--checkpoint: config")
  wan, folder = of_wan(config.model), pathlib.Path(a.checkpoint)
  if wan and not (folder / "text.json").is_file():
    raise UserError(f"--checkpoint: {folder} holds no text encoder for the prompts; convert one into it")
  if wan and not a.prompts:
    raise UserError("--prompts: none; Wan2.1's models want a text file, one prompt a line")
  given = {name: getattr(a, name) for name in ("shift", "guidance") if getattr(a, name) is not None}
  latents = a.latents or (CLIP if wan else config.model.chunk_frames)
  try:
    sampler = dataclasses.replace(
      MANY_STEPS if wan else config.sampler, kind="euler", steps=a.steps, last_sigma=0.0, **given
    )
    model = dataclasses.replace(config.model, chunk_frames=latents, param_dtype=config.model.dtype)
  except ValueError as e:
    whose = f"latents: {latents}; " if str(e).startswith("tile") else ""
    raise UserError(f"--{whose}{e}") from e
  own = dataclasses.replace(config.distill, teacher=a.checkpoint)  # whose text encoder embeds the prompts
  negative = NEGATIVE if wan else ""
  return dataclasses.replace(config, model=model, sampler=sampler, distill=own), negative


@command
def main(argv: list[str]) -> None:
  """Writes the trajectories shard by shard; shards that are there already are left as they are."""
  p = Parser(prog="python -m sfjax.ode", description=__doc__.splitlines()[0])
  p.add_argument("--checkpoint", required=True, help="folder of a bidirectional model, or a converted one of Wan2.1")
  p.add_argument("--out", required=True, help="folder of the shards; rerun to go on")
  p.add_argument("--prompts", metavar="FILE", help="one a line, taken in turn; default: captions as digits have them")
  p.add_argument("--pairs", type=int, default=1024)
  p.add_argument("--batch", type=int, default=32, help="clips side by side; a shard's clips")
  p.add_argument("--part", default="0/1", metavar="I/N", help=records.PART)
  p.add_argument("--latents", type=int, help="of a clip; default: those of the model's chunk, 21 for Wan2.1")
  p.add_argument("--steps", type=int, default=48, help="of the teacher")
  p.add_argument("--levels", type=int, default=4, help="steps of the student: a divisor of --steps")
  p.add_argument("--shift", type=float, help="of both schedules; default: the teacher's, 5 for Wan2.1")
  p.add_argument("--guidance", type=float, help="of the teacher; default: its own, 5 for Wan2.1")
  p.add_argument("--seed", type=int, default=0, help="of prompts and noise")
  a = p.parse_args(argv)
  for flag in ("pairs", "batch", "steps", "levels", "latents"):
    if getattr(a, flag) is not None and getattr(a, flag) < 1:
      raise UserError(f"--{flag}: {getattr(a, flag)}; want at least 1")
  if a.steps % a.levels:
    raise UserError(f"--levels: {a.levels} does not divide --steps {a.steps}")
  check_seed(a.seed)
  if a.pairs % a.batch:
    raise UserError(f"--pairs: {a.pairs} is not a multiple of --batch {a.batch}")
  part = records.part(a.part)
  config, negative = _teacher(a)
  model, sampler = config.model, config.sampler
  if a.prompts:
    prompts = PromptFile(a.prompts, "--prompts")
  else:
    prompts = Prompts(teacher_forcing.source(config, config.train.stages[0]))
  told = [prompts[(a.seed * 2**24 + i) % len(prompts)]["caption"] for i in range(a.pairs)]
  mine = [told[i] for shard in records.shards(len(told), a.batch, part) for i in shard]
  try:
    captions.encoder_of(model).prepare(config, {"--prompts": mine, "the negative prompt": [negative]})
  except UserError as e:
    raise UserError(str(e).replace("config.distill.teacher", "--checkpoint")) from e
  params = load_model(a.checkpoint, abstract_model(config), "--checkpoint")  # when the text encoder is gone
  keep_programs()

  @jax.jit
  def make(params, text, index):
    kv = functools.partial(captions.kv, model, params)
    shape = (model.chunk_frames, *model.latent_size, model.latent_channels)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(clip_keys(jax.random.key(a.seed), index))
    denoise = distill.denoiser(model, params["dit"], kv(text.prompt), kv(text.null), sampler.guidance)
    return trajectory(denoise, sampler, noise, a.levels).astype(jnp.float16)

  few = dataclasses.replace(sampler, kind="few_step", steps=a.levels, guidance=1.0)
  card = {name: value for name, value in vars(a).items() if name not in ("out", "part", "prompts")} | {
    "sigmas": few.sigmas.tolist(),
    "guidance": sampler.guidance,
    "shift": sampler.shift,
    "latents": model.chunk_frames,
    "negative": negative,
  }

  def states(index):
    own = told[index[0] : index[-1] + 1]
    return {"states": np.asarray(make(params, captions.text(config, own, negative), index))}

  records.write(a.out, _KIND, card, told, a.batch, part, states)


if __name__ == "__main__":
  main(sys.argv[1:])
