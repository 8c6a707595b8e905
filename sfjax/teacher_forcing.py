"""Training on clips, as a task of the training loop: its state, its clips, and one step over the devices of a mesh.

A bidirectional model trains by the same step: its one chunk is the clip.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from sfjax import captions, cluster, latents, rollout
from sfjax.axes import AXES, BATCH, mean_gradient, on_devices, split
from sfjax.codec import DigitsCodec
from sfjax.config import Config, Stage
from sfjax.data.digits import SIZE, DigitsConfig, frames_of_chunks
from sfjax.data.loader import DigitsSource, Source
from sfjax.data.video_folder import VideoFolder
from sfjax.errors import UserError
from sfjax.objective import loss
from sfjax.optimizer import averaged, begun, optimizer, skipped
from sfjax.parts import load_model, of_wan


def abstract_model(config: Config) -> dict:
  """Shapes of all trained parameters."""
  return {"dit": rollout.abstract_params(config.model)} | captions.encoder_of(config.model).abstract()


def init_model(config: Config, mesh: Mesh | None = None) -> dict:
  """Fresh parameters, or those of the folder `train.init`, split over the mesh if one is given."""
  if config.train.init:
    return load_model(config.train.init, cluster.laid_out(mesh, abstract_model(config)), "config.train.init")
  seed = config.train.seed
  fresh = lambda: {"dit": rollout.init_params(config.model, seed)} | captions.encoder_of(config.model).init(seed)
  return fresh() if mesh is None else cluster.made(fresh, cluster.shardings(mesh, abstract_model(config)))


def source(config: Config, stage: Stage) -> Source:
  """The stage's clips.

  Raises:
    UserError: an unknown source, no path where one is needed, a size that digits do not have, or see `latents.source`.
  """
  if of_wan(config.model):
    if config.data.source == "latents":
      return latents.source(config, stage)
    raise UserError(
      f"config.data.source: {config.data.source}; Wan2.1's models want latents, ode, or prompts and a config.distill.teacher"
    )
  data, frames = config.data, frames_of_chunks(stage.chunks)
  size = tuple(n * DigitsCodec().space for n in config.model.latent_size)
  if config.model.latent_channels != DigitsCodec().channels:
    raise UserError(
      f"config.model.latent_channels: {config.model.latent_channels}; pixels' want {DigitsCodec().channels}"
    )
  if data.source == "folder":
    if not data.path:
      raise UserError("config.data.path: ''; want the folder of the videos")
    return VideoFolder(data.path, size, data.fps, frames)
  if data.source != "digits":
    if data.source in (other := {"ode": "trajectories", "prompts": "captions alone", "latents": "Wan2.1's latents"}):
      what = other[data.source]
      raise UserError(f"config.data.source: {data.source} holds {what}, not clips; want digits or folder")
    raise UserError(f"config.data.source: {data.source!r}; accepted are digits, folder, latents, ode, prompts")
  if size != (SIZE, SIZE):
    want = SIZE // DigitsCodec().space
    raise UserError(f"config.model.latent_size: {config.model.latent_size}; digits want ({want}, {want})")
  mix = (1 - data.colour_only - data.none, data.colour_only, data.none)
  prompt = DigitsConfig(chunks=stage.chunks, caption_mix=mix)
  memory = None
  if stage.p_memory:
    memory = DigitsConfig(variant="memory", chunks=stage.chunks, hide_chunks=((1.0, *stage.hide),))
  return DigitsSource(prompt, memory, stage.p_memory, config.train.seed)


def inputs(config: Config, batch: dict):
  """A batch of the loader as arrays: (frames uint8 [B,F,h,w,3], or latents float16 [B,T,h,w,C], and `captions.Text`)."""
  return batch["latents" if of_wan(config.model) else "frames"], captions.text(config, batch["caption"])


def fixed(config: Config, mesh: Mesh | None = None):
  """What a step needs beside state and batches: nothing."""
  return ()


def state(config: Config, mesh: Mesh | None = None) -> dict:
  """{"step", "params", "ema", "opt"} before the first step, made where it lies on the mesh if one is given."""
  return state_of(config, init_model(config, mesh), mesh)


def state_of(config: Config, params: dict, mesh: Mesh | None = None) -> dict:
  """`state` with these parameters."""
  step, ema = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params)
  step = step if mesh is None else cluster.place(step, cluster.whole(mesh, step))
  return {"step": step, "params": params, "ema": ema, "opt": begun(optimizer(config.train), params, mesh)}


def clip_loss(config: Config, stage: Stage, params: dict, inputs, key, index):
  """`objective.loss` of a batch: (loss, metrics)."""
  clips, text = inputs
  x0 = clips.astype(jnp.float32) if of_wan(config.model) else DigitsCodec().encode(clips)
  return loss(config, stage, params, x0, text, key, index)


def step(
  config: Config, stage: Stage, mesh: Mesh, state: dict, fixed, batches: list, of=clip_loss
) -> tuple[dict, dict]:
  """One step: the state after it, and metrics. Devices differ in their clips alone.

  `batches` holds the `inputs` of each of the stage's parts, and the clips' places in the whole batch; `of`: their loss.
  """

  def total(params, batches, key):
    losses = []
    for i, (part, (inputs, index)) in enumerate(zip(stage.parts, batches, strict=True)):
      losses.append(of(config, part, params, inputs, jax.random.fold_in(key, i), index))
    metrics = losses[0][1] | ({"flow_firsts": losses[1][1]["flow"]} if stage.firsts else {})
    value = sum(value for value, _ in losses)
    return value, metrics | {"loss": value}

  def gradient(params, step, batches):  # of a device's own clips: kernels see whole arrays, no partitioner
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    (_, metrics), grads = jax.value_and_grad(total, has_aux=True)(params, batches, key)
    return jax.lax.pmean(metrics, AXES), mean_gradient(grads)

  shared, weights = PartitionSpec(), split(state["params"])
  gradient = on_devices(gradient, mesh, (weights, shared, BATCH), (shared, weights))
  metrics, grads = gradient(state["params"], state["step"], batches)
  updates, opt = optimizer(config.train).update(grads, state["opt"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  ema = averaged(config.train.ema, state["step"], state["ema"], params, opt)
  metrics |= {"grad_norm": optax.tree.norm(grads), "skipped": skipped(opt)}
  return {"step": state["step"] + 1, "params": params, "ema": ema, "opt": opt}, metrics
