"""Self-forcing as a task of the training loop: rollouts of a student, judged by a frozen teacher and by a critic that learns.

One step: prompts, a rollout of the student with its real memory, evictions and routing; the two scores of its last latents
move the student; then the critic takes several steps on those very latents, each with its own noise. Where a rollout is longer
than a clip of the teacher, what comes before is made without gradient. (self_forcing sections 4.2 to 4.5)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from sfjax import distill, rollout, teacher_forcing
from sfjax.checkpoint import load_config, load_params
from sfjax.cluster import AXES, BATCH
from sfjax.config import Config, Stage, to_dataclass
from sfjax.data.loader import Prompts, Source
from sfjax.errors import UserError
from sfjax.memory import init_memory
from sfjax.model import ModelConfig
from sfjax.objective import clip_keys, text_kv
from sfjax.optimizer import averaged, matrices, only_finite, optimizer, skipped

_FLAG = "config.distill.teacher"


@functools.cache
def teacher_model(config: Config) -> ModelConfig:
  """The teacher's architecture, computed in the student's dtype and with its remat; the critic has it too.

  Raises:
    UserError: no model folder, or one whose clips are not some of the student's chunks.
  """
  model = to_dataclass(Config, load_config(config.distill.teacher, _FLAG), _FLAG).model
  student = config.model
  for key in ("latent_size", "latent_channels", "text_len", "text_dim"):
    if getattr(model, key) != getattr(student, key):
      raise UserError(f"{_FLAG}: its {key} is {getattr(model, key)}; want the student's, {getattr(student, key)}")
  if model.chunk_frames % student.chunk_frames:
    raise UserError(f"{_FLAG}: its clips have {model.chunk_frames} latents; want a multiple of {student.chunk_frames}")
  return dataclasses.replace(model, dtype=student.dtype, remat=student.remat)


def judged_chunks(config: Config) -> int:
  """Chunks of the student in a clip of the teacher."""
  return teacher_model(config).chunk_frames // config.model.chunk_frames


def fixed(config: Config) -> dict:
  """The teacher's weights, {"dit", "text"}."""
  like = teacher_forcing.abstract_model(dataclasses.replace(config, model=teacher_model(config)))
  return load_params(config.distill.teacher, like, _FLAG)


def source(config: Config, stage: Stage) -> Source:
  """The prompts of clips as a stage of teacher forcing has them, as short as such clips can be.

  Raises:
    UserError: rollouts shorter than what the teacher judges, one-chunk clips beside them, a dense stage, accumulated
      gradients, or a sampler that is not a student's.
  """
  least, sampler = judged_chunks(config), config.sampler
  if stage.chunks < least or stage.firsts or stage.dense:
    what = f"chunks {stage.chunks}, firsts {stage.firsts}, dense {stage.dense}"
    raise UserError(
      f"config.train.stages: {what}; with a teacher want chunks of at least {least}, firsts 0, dense False"
    )
  if sampler.kind != "few_step" or sampler.guidance != 1:
    what = f"kind {sampler.kind}, guidance {sampler.guidance}"
    raise UserError(f"config.sampler: {what}; with a teacher want few_step and guidance 1")
  if config.train.accumulate != 1:
    raise UserError(f"config.train.accumulate: {config.train.accumulate}; with a teacher want 1")
  return Prompts(teacher_forcing.source(config, dataclasses.replace(stage, chunks=least)))


def inputs(config: Config, batch: dict):
  """A batch of the loader as an array: words int32 [B,M]."""
  return teacher_forcing.words(config, batch["caption"])


def critic_optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW without a schedule, clipped as the student's."""
  (b1, b2), t = config.train.betas, config.train
  adam = optax.adamw(config.distill.critic_lr, b1=b1, b2=b2, weight_decay=t.weight_decay, mask=matrices)
  return only_finite(optax.chain(optax.clip_by_global_norm(t.clip), adam))


def state(config: Config) -> dict:
  """{"step", "params", "ema", "opt", "critic", "critic_opt"} before the first step: the critic begins as the teacher."""
  critic = fixed(config)
  return teacher_forcing.state(config) | {"critic": critic, "critic_opt": critic_optimizer(config).init(critic)}


def student_rollout(config: Config, params: dict, words, key, samples, silent, exit_step):
  """`silent` chunks without gradient, then as many as the teacher judges: (latents [B,T,h,w,C], `rollout.Looks`)."""
  model, cfg, sampler = config.model, config.memory, config.sampler
  k, v = text_kv(model, params, words)
  memory, fixed = jax.lax.stop_gradient((init_memory(model, cfg, (k, v), config.train.seed), params["dit"]))
  one = lambda _, m: rollout.rollout_chunk(model, cfg, sampler, fixed, m, key, samples, in_place=True)[1]
  memory = jax.lax.fori_loop(0, silent, one, memory)
  latents, _, looks = rollout.self_forcing(
    model,
    cfg,
    sampler,
    params["dit"],
    memory.replace(cross_k=k, cross_v=v),
    key,
    samples,
    judged_chunks(config),
    exit_step,
    config.distill.cache_gradient,
  )
  return latents.reshape(latents.shape[0], -1, *latents.shape[3:]), looks


def student_loss(config: Config, params: dict, critic: dict, teacher: dict, words, keys, index, silent, exit_step):
  """The generator's loss and the importance head's: (loss, (metrics, latents [B,T,h,w,C])).

  Args:
    keys: of the rollout's noise and of the judges'. index: places of the clips in the step's whole batch.
  """
  model, d = teacher_model(config), config.distill
  play, judge = keys
  x, looks = student_rollout(config, params, words, play, index, silent, exit_step)
  kv = functools.partial(text_kv, model)
  real = distill.denoiser(model, teacher["dit"], kv(teacher, words), kv(teacher, jnp.zeros_like(words)), d.guidance)
  fake = distill.denoiser(model, critic["dit"], kv(critic, words))
  value, metrics = distill.STUDENT_LOSSES[d.loss](clip_keys(judge, index), x, real, fake, d.shift, d.levels)
  aux = jnp.zeros(())
  if config.memory.importance == "learned":
    aux = rollout.head_loss(config.model, config.memory, params["dit"], looks)
  total = value + config.train.importance_weight * aux
  return total, (metrics | {"loss": total, "importance": aux}, x)


def critic_loss(config: Config, critic: dict, words, keys, x):
  """The critic's loss on a student's latents x [B,T,h,w,C]; keys: one for each clip."""
  model = teacher_model(config)
  kv = text_kv(model, critic, words)
  output = lambda y, sigma: distill.whole_clip(model, critic["dit"], kv, y, sigma)
  return distill.critic_loss(keys, x, model, output, config.distill.shift, config.distill.levels)


def step(config: Config, stage: Stage, mesh: Mesh, state: dict, fixed: dict, batches: list) -> tuple[dict, dict]:
  """One step of the student and `critic_updates` of the critic: the state after them, and metrics.

  All devices' rollouts have one length, by half of the steps that of a teacher's clip, and leave at one step.
  """
  ((words, index),) = batches
  key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
  coin, length, leave, play, judge, critic_key = jax.random.split(key, 6)
  spare = stage.chunks - judged_chunks(config)
  silent = jax.random.randint(length, (), 1, spare + 1) * jax.random.bernoulli(coin) if spare else 0
  exit_step = jax.random.randint(leave, (), 0, config.sampler.steps)

  def of_student(params, critic, teacher, words, index):
    of = lambda p: student_loss(config, p, critic, teacher, words, (play, judge), index, silent, exit_step)
    (_, (metrics, x)), grads = jax.value_and_grad(of, has_aux=True)(params)
    return jax.lax.pmean((metrics, grads), AXES), x

  def of_critic(critic, words, index, key, x):
    of = lambda c: critic_loss(config, c, words, clip_keys(key, index), x)
    return jax.lax.pmean(jax.value_and_grad(of)(critic), AXES)

  shared, split = PartitionSpec(), BATCH
  own = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
  (metrics, grads), x = own(of_student, in_specs=(shared, shared, shared, split, split), out_specs=(shared, split))(
    state["params"], state["critic"], fixed, words, index
  )
  of_critic = own(of_critic, in_specs=(shared, split, split, shared, split), out_specs=shared)
  updates, opt = optimizer(config.train).update(grads, state["opt"], state["params"])
  params = optax.apply_updates(state["params"], updates)

  def learn(carry, key):
    critic, opt = carry
    loss, grads = of_critic(critic, words, index, key, x)
    updates, opt = critic_optimizer(config).update(grads, opt, critic)
    return (optax.apply_updates(critic, updates), opt), loss

  keys = jax.random.split(critic_key, config.distill.critic_updates)
  (critic, critic_opt), losses = jax.lax.scan(learn, (state["critic"], state["critic_opt"]), keys)
  metrics |= {
    "critic_loss": losses.mean(),
    "grad_norm": optax.tree.norm(grads),
    "rollout": judged_chunks(config) + silent,
  }
  metrics["skipped"] = jnp.maximum(skipped(opt), -(-skipped(critic_opt) // len(keys)))  # in steps
  new = {"step": state["step"] + 1, "params": params, "opt": opt, "critic": critic, "critic_opt": critic_opt}
  return new | {"ema": averaged(config.train.ema, state["step"], state["ema"], params, opt)}, metrics
