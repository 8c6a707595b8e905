"""The training loop, read top to bottom: stages of clips, one jitted step, logs, checkpoints, resume by rerunning."""

import functools
import json
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sfjax import rollout
from sfjax.checkpoint import Checkpoints, export, load_params
from sfjax.codec import DigitsCodec
from sfjax.config import Config, Stage, TrainConfig, to_dict
from sfjax.data.digits import SIZE, DigitsConfig, frames_of_chunks
from sfjax.data.loader import DigitsSource, make_loader
from sfjax.data.video_folder import VideoFolder
from sfjax.errors import UserError
from sfjax.metrics import MetricWriter
from sfjax.objective import loss
from sfjax.runlog import make_folder, peak_memory, run_record, write_json_atomic
from sfjax.text import WordEncoder

_DATA_SEED = 1000  # clips of stage i come from stream 1000 * seed + i
# What a rerun may change: how long, how often, how many helpers; the rest would make it another experiment.
_FREE = {
  f"train.{key}" for key in ("steps", "log_every", "save_every", "keep_last", "keep_every", "threads", "workers")
}


def abstract_model(config: Config) -> dict:
  """Shapes of all trained parameters."""
  text = jax.eval_shape(lambda: WordEncoder(config.model.text_len, config.model.text_dim).init(0))
  return {"dit": rollout.abstract_params(config.model), "text": text}


def init_model(config: Config) -> dict:
  """Fresh parameters, or those of the folder `train.init`."""
  if config.train.init:
    return load_params(config.train.init, abstract_model(config), "config.train.init")
  seed = config.train.seed
  encoder = WordEncoder(config.model.text_len, config.model.text_dim)
  return {"dit": rollout.init_params(config.model, seed), "text": encoder.init(seed)}


def clips(config: Config, stage: Stage):
  """The stage's source of clips."""
  data, frames = config.data, frames_of_chunks(stage.chunks)
  size = tuple(n * DigitsCodec().space for n in config.model.latent_size)
  if data.source == "folder":
    if not data.path:
      raise UserError("config.data.path: ''; want the folder of the videos")
    return VideoFolder(data.path, size, data.fps, frames)
  if data.source != "digits":
    raise UserError(f"config.data.source: {data.source!r}; accepted are digits, folder")
  if size != (SIZE, SIZE):
    want = SIZE // DigitsCodec().space
    raise UserError(f"config.model.latent_size: {config.model.latent_size}; digits want ({want}, {want})")
  mix = (1 - data.colour_only - data.none, data.colour_only, data.none)
  prompt = DigitsConfig(chunks=stage.chunks, caption_mix=mix)
  memory = None
  if stage.p_memory:
    memory = DigitsConfig(variant="memory", chunks=stage.chunks, hide_chunks=((1.0, *stage.hide),))
  return DigitsSource(prompt, memory, stage.p_memory, config.train.seed)


def check_same_experiment(workdir, old: dict, new: dict) -> None:
  """Raises UserError, naming the first key, if a rerun's config differs in more than how long and how often."""
  old, new = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
  for key in sorted(old.keys() | new.keys()):
    if old.get(key) != new.get(key) and key not in _FREE:
      raise UserError(f"--workdir: {workdir} holds a run with config.{key} = {old.get(key)!r}, not {new.get(key)!r}")


def learning_rate(t: TrainConfig) -> optax.Schedule:
  """Linear warm-up, constant, linear decay to a twentieth."""
  warmup = min(t.warmup, t.steps - 1)
  decay = max(1, min(round(t.decay * t.steps), t.steps - warmup))
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, t.lr, warmup),
      optax.constant_schedule(t.lr),
      optax.linear_schedule(t.lr, 0.05 * t.lr, decay),
    ],
    [warmup, t.steps - decay],
  )


def _is_matrix(path, x) -> bool:
  """Whether a parameter is a Linear's matrix (or a stack of them); biases, gains and embeddings are not."""
  return getattr(path[-1], "key", None) == "kernel"


def optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW or Muon with the schedule of `learning_rate` and clipping; matrices alone decay."""
  t = config.train
  matrices = lambda p: jax.tree_util.tree_map_with_path(_is_matrix, p)
  if t.optimizer == "adamw":
    tx = optax.adamw(learning_rate(t), b2=0.99, weight_decay=t.weight_decay, mask=matrices)
  else:

    def orthogonal(p):  # the blocks' matrices, stacked over layers
      axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
      return jax.tree_util.tree_map_with_path(lambda path, x: axes if _is_matrix(path, x) and x.ndim == 3 else None, p)

    tx = optax.contrib.muon(
      learning_rate(t),
      weight_decay=t.weight_decay,
      weight_decay_mask=matrices,
      adam_b2=0.99,
      adam_weight_decay=t.weight_decay,
      muon_weight_dimension_numbers=orthogonal,
      consistent_rms=0.2,  # updates as large as Adam's, so that one learning rate serves both
    )
  tx = optax.chain(optax.clip_by_global_norm(t.clip), tx)
  return tx if t.accumulate == 1 else optax.MultiSteps(tx, t.accumulate).gradient_transformation()


def data_mesh() -> Mesh:
  """All devices along the one axis "data": each takes its share of a batch."""
  return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def train_step(config: Config, stage: Stage, mesh: Mesh, state: dict, batches: list) -> tuple[dict, dict]:
  """One step: state {"step", "params", "ema", "opt"} and metrics. Devices differ in their clips and noise alone.

  `batches` holds (frames, words) of each of the stage's parts.
  """

  def total(params, batches, key):
    losses = []
    for i, (part, (frames, words)) in enumerate(zip(stage.parts, batches, strict=True)):
      latents = DigitsCodec().encode(frames)
      losses.append(loss(config, part, params, latents, words, jax.random.fold_in(key, i)))
    metrics = losses[0][1] | ({"flow_firsts": losses[1][1]["flow"]} if stage.firsts else {})
    value = sum(value for value, _ in losses)
    return value, metrics | {"loss": value}

  def gradient(params, step, batches):  # of a device's own clips: kernels see whole arrays, no partitioner
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    key = jax.random.fold_in(key, jax.lax.axis_index("data"))
    (_, metrics), grads = jax.value_and_grad(total, has_aux=True)(params, batches, key)
    return jax.lax.pmean((metrics, grads), "data")

  shared, split = PartitionSpec(), PartitionSpec("data")
  gradient = jax.shard_map(gradient, mesh=mesh, in_specs=(shared, shared, split), out_specs=shared, check_vma=False)
  metrics, grads = gradient(state["params"], state["step"], batches)
  updates, opt = optimizer(config).update(grads, state["opt"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  decay = jnp.minimum(config.train.ema, (1.0 + state["step"]) / (10.0 + state["step"]))
  ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state["ema"], params)
  metrics["grad_norm"] = optax.tree.norm(grads)
  return {"step": state["step"] + 1, "params": params, "ema": ema, "opt": opt}, metrics


class StopSignal:
  """While entered, the first Ctrl-C only sets `asked`, so that no step is cut in half; a second one interrupts at once."""

  def __init__(self):
    self.asked = False

  def _ask(self, *_):
    self.asked = True
    signal.signal(signal.SIGINT, self._before)

  def __enter__(self):
    self._before = signal.signal(signal.SIGINT, self._ask)
    return self

  def __exit__(self, *_):
    signal.signal(signal.SIGINT, self._before)


def train(config: Config, workdir: str) -> pathlib.Path:
  """Trains to the end, or from the newest checkpoint of `workdir` on; returns the exported model's folder.

  Raises:
    UserError: a folder that cannot be written, an unknown data source, a loss that is not finite.
  """
  t = config.train
  workdir = make_folder(workdir, "--workdir")
  mesh = data_mesh()
  sharding, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
  for stage in t.stages:
    for part in stage.parts:
      if part.batch % jax.device_count():
        raise UserError(f"config.train.stages: batch {part.batch} does not divide over {jax.device_count()} devices")
      clips(config, part)
  params = init_model(config)
  state = {
    "step": jnp.zeros((), jnp.int32),
    "params": params,
    "ema": jax.tree.map(jnp.copy, params),
    "opt": optimizer(config).init(params),
  }
  state = jax.device_put(state, everywhere)
  checkpoints = Checkpoints(workdir / "checkpoints", t.keep_last, t.keep_every)
  loader_state = None
  if checkpoints.latest() is not None:
    check_same_experiment(workdir, checkpoints.meta()["config"], json.loads(json.dumps(to_dict(config))))
    state, meta = checkpoints.restore(state)
    loader_state = meta["loader"]
  step = int(state["step"])
  encoder = WordEncoder(config.model.text_len, config.model.text_dim)
  writer = MetricWriter(workdir, t.steps, step)
  pending, began, last_log = [], time.time(), (time.time(), step)
  loaders, running = [], None

  def save():
    checkpoints.save(
      step, state["ema"], state, {"loader": [running, *(x.get_state() for x in loaders)], "config": to_dict(config)}
    )

  def flush():
    """Reads the metrics since the last log; stops the run, before anything is saved, if a loss is not finite."""
    nonlocal pending, last_log
    values = jax.device_get(pending)
    for i, v in enumerate(values):
      if not np.isfinite(v["loss"]):
        bad = step - len(values) + i + 1
        raise UserError(
          f"the loss is not finite at step {bad}; the last good checkpoint is step {checkpoints.latest()}"
        )
    if values:
      mean = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
      now = time.time()
      writer.write(step, mean | {"steps_per_second": (step - last_log[1]) / max(now - last_log[0], 1e-9)})
      last_log = (now, step)
    pending = []

  stop = StopSignal()
  with writer, stop:
    try:
      while step < t.steps and not stop.asked:
        if running != t.stage_at(step):
          running = t.stage_at(step)
          stage = t.stages[running]
          order = _DATA_SEED * t.seed + running
          loaders = [
            make_loader(clips(config, part), part.batch, order, threads=t.threads, workers=t.workers)
            for part in stage.parts
          ]
          if loader_state and loader_state[0] == running:
            for loader, saved in zip(loaders, loader_state[1:], strict=True):
              loader.set_state(saved)
          advance = jax.jit(functools.partial(train_step, config, stage, mesh), donate_argnums=0)
        batches = [(b["frames"], encoder.tokens(b["caption"], "caption")) for b in map(next, loaders)]
        state, metrics = advance(state, jax.device_put(batches, sharding))
        pending.append(metrics)
        step += 1
        writer.advance()
        if step % t.log_every == 0 or step % t.save_every == 0 or step == t.steps:
          flush()
        if step % t.save_every == 0 or step == t.steps:
          save()
      if stop.asked:
        flush()
        if checkpoints.latest() != step:
          save()
        print(f"interrupted: saved step {step} in {workdir / 'checkpoints'}; rerun the same command to go on")
        raise KeyboardInterrupt
    finally:
      checkpoints.close()
  card = run_record(
    to_dict(config), steps=step, seed=t.seed, seconds=round(time.time() - began, 1), peak_memory=peak_memory()
  )
  write_json_atomic(workdir / "run.json", card)
  export(workdir / "model", jax.device_get(state["ema"]), to_dict(config), card)
  return workdir / "model"
