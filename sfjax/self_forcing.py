"""Self-forcing as a task of the training loop: rollouts of a student, judged by a frozen teacher and by a critic that learns.

One step: prompts, a rollout of the student with its real memory, evictions and routing; the two scores of its last latents
move the student; then the critic takes several steps on those very latents, each with its own noise. Where a rollout is longer
than a clip of the teacher, what comes before is made without gradient. (self_forcing sections 4.2 to 4.5)

With `Stage.known`, clips that hide a digit begin real: the chunks that show and cover it are given to the memory and to the
judges, and the student makes the rest, the uncovering among it. Clips are as long as the teacher's, so that every second
rollout, which is no longer, is judged from the showing to the uncovering; in a longer one the real chunks are as far back.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int32, UInt8

from sfjax import captions, cluster, distill, rollout, teacher_forcing
from sfjax.axes import AXES, BATCH, mean_gradient, on_devices, split
from sfjax.checkpoint import load_config
from sfjax.codec import DigitsCodec
from sfjax.config import Config, Stage, to_dataclass
from sfjax.data.digits import frames_of_chunks
from sfjax.data.loader import Beginnings, PromptFile, Prompts, Source
from sfjax.errors import UserError
from sfjax.memory import init_memory
from sfjax.model import ModelConfig
from sfjax.objective import clip_keys
from sfjax.optimizer import averaged, begun, matrices, only_finite, optimizer, skipped
from sfjax.parts import load_model


def _teacher_folder(config: Config) -> tuple[str, str]:
  return config.distill.teacher, "config.distill.teacher"


def _critic_folder(config: Config) -> tuple[str, str]:
  return (config.distill.critic, "config.distill.critic") if config.distill.critic else _teacher_folder(config)


def model_of(folder: str, flag: str) -> ModelConfig:
  """The architecture of a model folder. Raises UserError: there is none, or it is damaged; names `flag`."""
  return to_dataclass(Config, load_config(folder, flag), flag).model


def _judge(config: Config, model: ModelConfig, flag: str) -> ModelConfig:
  """An architecture as a judge's: of whole clips, computed in the student's dtype and with its remat."""
  student = config.model
  for key in ("latent_size", "latent_channels", "text_len", "text_dim"):
    if getattr(model, key) != getattr(student, key):
      raise UserError(f"{flag}: its {key} is {getattr(model, key)}; want the student's, {getattr(student, key)}")
  latents = config.distill.latents or model.chunk_frames
  if latents % student.chunk_frames:
    raise UserError(f"{flag}: its clips have {latents} latents; want a multiple of {student.chunk_frames}")
  return dataclasses.replace(model, chunk_frames=latents, dtype=student.dtype, remat=student.remat)


def as_teacher(config: Config, model: ModelConfig, flag: str) -> ModelConfig:
  """An architecture as the teacher's; its weights, which never change, are held in the dtype that it computes in.

  Raises:
    UserError: its latents or text are not the student's, or its clips not some of the student's chunks; names `flag`.
  """
  model = _judge(config, model, flag)
  return dataclasses.replace(model, param_dtype=model.dtype)


def as_critic(config: Config, model: ModelConfig, flag: str) -> ModelConfig:
  """An architecture as the critic's. Raises UserError as `as_teacher` does."""
  return dataclasses.replace(_judge(config, model, flag), param_dtype="float32")


@functools.cache
def teacher_model(config: Config) -> ModelConfig:
  """The architecture of the teacher's folder. Raises UserError: no model folder, or see `as_teacher`."""
  folder, flag = _teacher_folder(config)
  return as_teacher(config, model_of(folder, flag), flag)


@functools.cache
def critic_model(config: Config) -> ModelConfig:
  """The critic's architecture: that of the folder it begins as.

  Raises:
    UserError: see `teacher_model`; or its clips are not as long as the teacher's.
  """
  folder, flag = _critic_folder(config)
  model, latents = as_critic(config, model_of(folder, flag), flag), teacher_model(config).chunk_frames
  if model.chunk_frames != latents:
    raise UserError(f"{flag}: its clips have {model.chunk_frames} latents; want the teacher's {latents}")
  return model


def judged_chunks(config: Config) -> int:
  """Chunks of the student in a clip of the teacher."""
  return teacher_model(config).chunk_frames // config.model.chunk_frames


def abstract_judge(model: ModelConfig) -> dict:
  """Shapes of a judge's weights."""
  return {"dit": rollout.abstract_params(model)} | captions.encoder_of(model).abstract()


def fixed(config: Config, mesh: Mesh | None = None) -> dict:
  """The teacher's weights, split over the mesh if one is given."""
  return load_model(
    config.distill.teacher, cluster.laid_out(mesh, abstract_judge(teacher_model(config))), _teacher_folder(config)[1]
  )


def source(config: Config, stage: Stage) -> Source:
  """The prompts of clips as a stage of teacher forcing has them, as short as such clips can be, and their first known chunks.

  Raises:
    UserError: rollouts shorter than what the teacher judges, one-chunk clips beside them, a dense stage, accumulated
      gradients, a sampler that is not a student's, no prompts, or known chunks where no clip has any or all would be known.
  """
  least, sampler = judged_chunks(config), config.sampler
  if stage.chunks < least or stage.firsts or stage.dense:
    what = f"chunks {stage.chunks}, firsts {stage.firsts}, dense {stage.dense}"
    raise UserError(
      f"config.train.stages: {what}; with a teacher want chunks of at least {least}, firsts 0, dense False"
    )
  if wrong := rollout.untrainable(sampler):
    raise UserError(f"config.sampler: {wrong}; that is what a teacher can train")
  if config.train.accumulate != 1:
    raise UserError(f"config.train.accumulate: {config.train.accumulate}; with a teacher want 1")
  if stage.known and (config.data.source != "digits" or not stage.p_memory or not 0 < stage.known < least):
    what = f"known {stage.known}, p_memory {stage.p_memory}, of source {config.data.source}"
    raise UserError(f"config.train.stages: {what}; want known below {least}, p_memory above 0, source digits")
  if config.data.source in ("ode", "latents"):
    raise UserError(
      f"config.data.source: {config.data.source}, and a config.distill.teacher; want one of the two, or prompts"
    )
  told, encoder = {"config.distill.negative": [config.distill.negative]}, captions.encoder_of(config.model)
  if config.data.source != "prompts":
    encoder.prepare(config, told)
    clips = teacher_forcing.source(config, dataclasses.replace(stage, chunks=least))
    return Beginnings(clips, frames_of_chunks(stage.known)) if stage.known else Prompts(clips)
  prompts = PromptFile(config.data.path, "config.data.path")
  encoder.prepare(config, told | {"config.data.path": prompts.lines})
  return prompts


class Start(NamedTuple):
  """What a batch's clips may begin with: real frames, and how many chunks of them are given; 0 where all is to be made."""

  frames: UInt8[Array, "B F H W 3"]
  chunks: Int32[Array, "B"]

  def encoded(self, model: ModelConfig) -> rollout.Beginning:
    x = DigitsCodec().encode(self.frames)
    x = x.reshape(x.shape[0], -1, model.chunk_frames, *x.shape[2:])
    return rollout.Beginning(x, jnp.arange(x.shape[1]) < self.chunks[:, None])


def inputs(config: Config, batch: dict) -> tuple[captions.Text, Start | None]:
  """A batch of the loader as arrays."""
  text = captions.text(config, batch["caption"], config.distill.negative)
  return text, Start(batch["frames"], batch["prefix"]) if "frames" in batch else None


def critic_optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW without a schedule, clipped as the student's."""
  (b1, b2), t = config.train.betas, config.train
  adam = optax.adamw(config.distill.critic_lr, b1=b1, b2=b2, weight_decay=t.weight_decay, mask=matrices)
  return only_finite(optax.chain(optax.clip_by_global_norm(t.clip), adam))


def state(config: Config, mesh: Mesh | None = None) -> dict:
  """{"step", "params", "ema", "opt", "critic", "critic_opt"} before the first step, on the mesh if one is given."""
  folder, flag = _critic_folder(config)
  critic = load_model(folder, cluster.laid_out(mesh, abstract_judge(critic_model(config))), flag)
  return state_of(config, teacher_forcing.init_model(config, mesh), critic, mesh)


def state_of(config: Config, params: dict, critic: dict, mesh: Mesh | None = None) -> dict:
  """`state` with these parameters."""
  critic_opt = begun(critic_optimizer(config), critic, mesh)
  return teacher_forcing.state_of(config, params, mesh) | {"critic": critic, "critic_opt": critic_opt}


def student_rollout(
  config: Config, params: dict, prompt: captions.Rows, key, samples, silent, exit_step, start: Start | None = None
):
  """`silent` chunks without gradient, then as many as the teacher judges: (latents [B,T,h,w,C], `rollout.Looks`)."""
  model, cfg, sampler = config.model, config.memory, config.sampler
  text_kv = captions.kv(model, params, prompt)
  memory = init_memory(model, cfg, text_kv, clip_keys(jax.random.fold_in(key, 2**31 - 1), samples))  # no clip's number
  memory, fixed = jax.lax.stop_gradient((memory, params["dit"]))
  quiet, fixed = rollout.for_compute(model, fixed)
  beginning = start and start.encoded(model)
  silently = functools.partial(rollout.rollout_chunk, in_place=True, beginning=beginning)
  one = lambda _, m: silently(quiet, cfg, sampler, fixed, m, key, samples)[1]
  memory = jax.lax.fori_loop(0, silent, one, memory)
  latents, _, looks = rollout.self_forcing(
    model,
    cfg,
    sampler,
    params["dit"],
    memory.with_text(text_kv),
    key,
    samples,
    judged_chunks(config),
    exit_step,
    config.distill.cache_gradient,
    beginning,
  )
  return latents.reshape(latents.shape[0], -1, *latents.shape[3:]), looks


def real_score(config: Config, teacher: dict, text: captions.Text) -> distill.Denoiser:
  """The teacher's opinion, with guidance."""
  model = teacher_model(config)
  kv = functools.partial(captions.kv, model, teacher)
  return distill.denoiser(model, teacher["dit"], kv(text.prompt), kv(text.null), config.distill.guidance)


def fake_score(config: Config, critic: dict, text: captions.Text) -> distill.Denoiser:
  """The critic's opinion."""
  model = critic_model(config)
  return distill.denoiser(model, critic["dit"], captions.kv(model, critic, text.prompt))


def student_loss(
  config: Config,
  params: dict,
  critic: dict,
  teacher: dict,
  text: captions.Text,
  keys,
  index,
  silent,
  exit_step,
  start: Start | None = None,
):
  """The generator's loss and the importance head's: (loss, (metrics, latents [B,T,h,w,C])).

  Real latents are judged with the rest, and counted in the mean and in what it is normalised by: they give what is made its
  context, and move nothing themselves.

  Args:
    keys: of the rollout's noise and of the judges'. index: places of the clips in the step's whole batch.
  """
  play, judge = keys
  x, looks = student_rollout(config, params, text.prompt, play, index, silent, exit_step, start)
  real, fake = real_score(config, teacher, text), fake_score(config, critic, text)
  d = config.distill
  value, metrics = distill.STUDENT_LOSSES[d.loss](clip_keys(judge, index), x, real, fake, d.shift, d.levels)
  aux = jnp.zeros(())
  if config.memory.importance == "learned":
    aux = rollout.head_loss(config.model, config.memory, params["dit"], looks)
  total = value + config.train.importance_weight * aux
  return total, (metrics | {"loss": total, "importance": aux}, x)


def critic_loss(config: Config, critic: dict, prompt: captions.Rows, keys, x):
  """The critic's loss on a student's latents x [B,T,h,w,C]; keys: one for each clip.

  Real latents of a beginning count like the others: it is asked about whole clips, beside a teacher that knows real ones.
  """
  model = critic_model(config)
  kv = captions.kv(model, critic, prompt)
  output = lambda y, sigma: distill.whole_clip(model, critic["dit"], kv, y, sigma)
  return distill.critic_loss(keys, x, model, output, config.distill.shift, config.distill.levels)


def drawn(config: Config, stage: Stage, step):
  """What a step draws for all devices: silent chunks, the exit step, and keys of the rollout, the judges and the critic."""
  key = jax.random.fold_in(jax.random.key(config.train.seed), step)
  coin, length, leave, *keys = jax.random.split(key, 6)
  spare = stage.chunks - judged_chunks(config)
  silent = jax.random.randint(length, (), 1, spare + 1) * jax.random.bernoulli(coin) if spare else 0
  return silent, jax.random.randint(leave, (), 0, config.sampler.steps), keys


def step(config: Config, stage: Stage, mesh: Mesh, state: dict, fixed: dict, batches: list) -> tuple[dict, dict]:
  """One step of the student and `critic_updates` of the critic: the state after them, and metrics.

  All devices' rollouts have one length, by half of the steps that of a teacher's clip, and leave at one step.
  """
  (((text, start), index),) = batches
  silent, exit_step, (play, judge, critic_key) = drawn(config, stage, state["step"])

  def of_student(params, critic, teacher, text, start, index):
    of = lambda p: student_loss(config, p, critic, teacher, text, (play, judge), index, silent, exit_step, start)
    (_, (metrics, x)), grads = jax.value_and_grad(of, has_aux=True)(params)
    return (jax.lax.pmean(metrics, AXES), mean_gradient(grads)), x

  def of_critic(critic, prompt, index, key, x):
    of = lambda c: critic_loss(config, c, prompt, clip_keys(key, index), x)
    loss, grads = jax.value_and_grad(of)(critic)
    return jax.lax.pmean(loss, AXES), mean_gradient(grads)

  shared = PartitionSpec()
  student, judge_weights, teacher = split(state["params"]), split(state["critic"]), split(fixed)
  of_student = on_devices(
    of_student, mesh, (student, judge_weights, teacher, BATCH, BATCH, BATCH), ((shared, student), BATCH)
  )
  (metrics, grads), x = of_student(state["params"], state["critic"], fixed, text, start, index)
  of_critic = on_devices(of_critic, mesh, (judge_weights, BATCH, BATCH, shared, BATCH), (shared, judge_weights))
  updates, opt = optimizer(config.train).update(grads, state["opt"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  # The critic's turn comes when the student's gradient is gone: else both would be held at once.
  x, params, opt = jax.lax.optimization_barrier((x, params, opt))
  x, critic_opt = cluster.fetched(x, state["critic_opt"])

  def learn(carry, key):
    critic, opt = carry
    loss, grads = of_critic(critic, text.prompt, index, key, x)
    updates, opt = critic_optimizer(config).update(grads, opt, critic)
    return (optax.apply_updates(critic, updates), opt), loss

  keys = jax.random.split(critic_key, config.distill.critic_updates)
  (critic, critic_opt), losses = jax.lax.scan(learn, (state["critic"], critic_opt), keys)
  metrics |= {
    "critic_loss": losses.mean(),
    "grad_norm": optax.tree.norm(grads),
    "rollout": judged_chunks(config) + silent,
  }
  metrics["skipped"] = jnp.maximum(skipped(opt), -(-skipped(critic_opt) // len(keys)))  # in steps
  new = {"step": state["step"] + 1, "params": params, "opt": opt, "critic": critic, "critic_opt": critic_opt}
  return new | {"ema": averaged(config.train.ema, state["step"], state["ema"], params, opt)}, metrics
