"""The training loop, read top to bottom: stages, one jitted step, logs, checkpoints, resume by rerunning.

What a step does is a task's matter: `teacher_forcing` on clips, `ode` on a teacher's trajectories, `self_forcing` against a
teacher. Every host of a run goes through the same loop; the first one logs and exports.
"""

import contextlib
import dataclasses
import functools
import pathlib
import signal
import time

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sfjax import cluster, ode, self_forcing, teacher_forcing
from sfjax.checkpoint import Checkpoints
from sfjax.config import OFFLOAD, Config, Stage, to_dataclass, to_dict
from sfjax.data.loader import make_loader
from sfjax.errors import UserError
from sfjax.metrics import MetricWriter
from sfjax.model import ModelConfig
from sfjax.parts import export_model
from sfjax.runlog import make_folder, peak_memory, run_record, write_json_atomic

_DATA_SEED = 1000  # the clips of stage i come in the order of seed 1000 * train.seed + i
# What a rerun may change: how long, how often, how many workers; the rest would make it another experiment.
_FREE = {
  *(f"train.{key}" for key in ("steps", "log_every", "save_every", "keep_last", "keep_every", "threads", "workers")),
  *(f"train.{key}" for key in ("fsdp", "context", "tensor", "offload")),
}


def check_same_experiment(workdir, old: dict, new: dict) -> None:
  """Raises UserError, naming the first key, if a rerun's config differs in more than how long and how often."""
  old, new = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
  for key in sorted(old.keys() | new.keys()):
    if old.get(key) != new.get(key) and key not in _FREE:
      raise UserError(f"--workdir: {workdir} holds a run with config.{key} = {old.get(key)!r}, not {new.get(key)!r}")


def task(config: Config):
  """The module that says what a step is: its `state`, `fixed`, `source`, `inputs` and `step`."""
  if config.distill.teacher:
    return self_forcing
  return ode if config.data.source == "ode" else teacher_forcing


def models(config: Config) -> dict[str, ModelConfig]:
  """What a step runs, by name. Raises UserError: no folder of the teacher or critic."""
  if not config.distill.teacher:
    return {"config.model": config.model}
  judges = {"teacher": self_forcing.teacher_model(config), "critic": self_forcing.critic_model(config)}
  return {"config.model": config.model} | {f"config.distill.{name}": model for name, model in judges.items()}


def check_context(config: Config) -> None:
  """Raises UserError where clips cannot be split over config.train.context devices; single chunks are not split."""
  context = config.train.context
  if config.distill.teacher and context > 1:
    raise UserError(f"config.train.context: {context}; with a teacher want 1, as its rollouts are made chunk by chunk")
  for stage in config.train.stages:
    if stage.chunks > 1 and stage.chunks % context:
      raise UserError(f"config.train.context: {context} does not divide a stage's {stage.chunks} chunks")


def check_batches(config: Config, mesh: Mesh) -> None:
  """Raises UserError where a stage's batch cannot be split over the devices that have clips of their own."""
  t = config.train
  for part in (part for stage in t.stages for part in stage.parts):
    if part.batch % (mesh.size // t.together):
      over = cluster.told(mesh.size, t.together)
      raise UserError(f"config.train.stages: batch {part.batch} does not divide over {over}")


def where_kept(config: Config, mesh: Mesh, state: dict):
  """Where the state of training lies between steps: over the mesh, and in its hosts' memory what config.train.offload says."""
  where = cluster.shardings(mesh, state)
  return {
    name: cluster.kept_by_host(x, state[name]) if name in OFFLOAD[config.train.offload] else x
    for name, x in where.items()
  }


def jitted_step(config: Config, stage: Stage, mesh: Mesh, where):
  """The task's step, (state, fixed, batches) -> (state, metrics), its state kept at the shardings `where`, in place."""
  step = functools.partial(task(config).step, config, stage, mesh)
  return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def with_batches(config: Config, begun: Config | None = None) -> Config:
  """The config with batches of 0 as a run that has begun has them, else one clip for each device that has its own."""
  own = jax.device_count() // config.train.together
  before = begun.train.stages if begun and len(begun.train.stages) == len(config.train.stages) else config.train.stages
  stages = tuple(
    dataclasses.replace(s, batch=s.batch or b.batch or own) for s, b in zip(config.train.stages, before, strict=True)
  )
  return dataclasses.replace(config, train=dataclasses.replace(config.train, stages=stages))


class StopSignal:
  """While entered, the first Ctrl-C or SIGTERM only sets `asked`, so that no step is cut in half; a second one acts at once."""

  _SIGNALS = signal.SIGINT, signal.SIGTERM

  def __init__(self):
    self.asked = None

  def _ask(self, number, _):
    self.asked = number
    self.__exit__()

  def __enter__(self):
    self._before = [signal.signal(s, self._ask) for s in self._SIGNALS]
    return self

  def __exit__(self, *_):
    for s, before in zip(self._SIGNALS, self._before, strict=True):
      signal.signal(s, before)

  def leave(self):
    """Ends as was asked for: SIGTERM, a machine's notice that it will be taken away, with exit code 0."""
    raise KeyboardInterrupt if self.asked == signal.SIGINT else SystemExit(0)


def train(config: Config, workdir: str) -> pathlib.Path:
  """Trains to the end, or from the newest checkpoint of `workdir` on; returns the exported model's folder.

  Raises:
    UserError: a folder that cannot be written, a model for sampling alone, an unknown data source, a step too large for a
      device, gradients that stay not finite.
    KeyboardInterrupt, SystemExit: after Ctrl-C, and with code 0 after SIGTERM, with all that was done saved.
  """
  config.check_trains()
  mesh = cluster.make_mesh(config.train.fsdp, config.train.tensor, config.train.context)
  asked_for, config = config, with_batches(config)
  t, work = config.train, task(config)
  hosts, first_host = jax.process_count(), jax.process_index() == 0
  workdir = make_folder(workdir, "--workdir")
  cluster.check_tensor(t.tensor, models(config))
  check_context(config)
  check_batches(config, mesh)
  for stage in t.stages:
    for part in stage.parts:
      work.source(config, part)
  state, fixed = work.state(config, mesh), work.fixed(config, mesh)
  where = where_kept(config, mesh, state)
  state = jax.device_put(state, where)
  checkpoints = Checkpoints(workdir / "checkpoints", t.keep_last, t.keep_every)
  if checkpoints.latest() is not None:
    begun = to_dataclass(Config, checkpoints.meta()["config"], f"--workdir: {workdir}: config")
    config = with_batches(asked_for, begun)
    check_same_experiment(workdir, to_dict(with_batches(begun)), to_dict(config))
    check_batches(config, mesh)
    t = config.train
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    state = None  # a device need not hold two
    with cluster.explained():
      state, _ = checkpoints.restore(like)
  step = int(state["step"])
  writer = MetricWriter(workdir, t.steps, step) if first_host else None
  pending, began, last_log = [], time.time(), (time.time(), step)
  running, needs = None, None

  def save():
    checkpoints.save(step, state["ema"], state, {"config": to_dict(config)})
    if t.offload != "none":
      checkpoints.wait()  # what is written may be the host's very memory, which the next step takes over

  def flush():
    """Reads the metrics since the last log; stops the run where gradients stay not finite (such steps changed nothing)."""
    nonlocal pending, last_log
    values = jax.device_get(pending)
    for i, v in enumerate(values):
      if v["skipped"] >= t.patience:
        bad = step - len(values) + i + 1
        raise UserError(
          f"step {bad}: {t.patience} gradients in a row are not finite; the newest checkpoint is step {checkpoints.latest()}"
        )
    if values and writer:
      good = [v for v in values if not v["skipped"]] or values
      mean = {k: float(np.mean([v[k] for v in good])) for k in values[0]}
      mean["skipped"] = sum(v["skipped"] > 0 for v in values)
      now = time.time()
      writer.write(step, mean | {"steps_per_second": (step - last_log[1]) / max(now - last_log[0], 1e-9)})
      last_log = (now, step)
    pending = []

  def asked() -> bool:
    """Whether some host was asked to stop; hosts tell each other when they log, so that all stop at one step."""
    if hosts == 1:
      return bool(stop.asked)
    return step % t.log_every == 0 and bool(multihost_utils.process_allgather(np.int32(stop.asked or 0)).any())

  stop = StopSignal()
  with writer or contextlib.nullcontext(), stop, cluster.explained():
    try:
      while step < t.steps and not asked():
        index, done = t.stage_at(step)
        if running != index:
          flush()  # another stage's metrics may have other names
          running, stage = index, t.stages[index]
          loaders = [
            make_loader(
              work.source(config, part),
              part.batch // hosts,
              _DATA_SEED * t.seed + index,
              start=done,
              threads=t.threads,
              workers=t.workers,
              process_index=jax.process_index(),
              process_count=hosts,
            )
            for part in stage.parts
          ]
          places = [cluster.places(part.batch // hosts) for part in stage.parts]
          advance = None
        batches = [(work.inputs(config, next(loader)), at) for loader, at in zip(loaders, places, strict=True)]
        batches = cluster.share(mesh, batches)
        if advance is None:
          advance = jitted_step(config, stage, mesh, where).lower(state, fixed, batches).compile()
          needs = cluster.step_bytes(advance)
          if first_host:
            print("a step takes on each device: " + ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in needs.items()))
        state, metrics = advance(state, fixed, batches)
        pending.append(metrics)
        step += 1
        if writer:
          writer.advance()
        if step % t.log_every == 0 or step % t.save_every == 0 or step == t.steps:
          flush()
        if step % t.save_every == 0 or step == t.steps:
          save()
      if step < t.steps:
        flush()
        if checkpoints.latest() != step:
          save()
        print(f"interrupted: saved step {step} in {workdir / 'checkpoints'}; rerun the same command to go on")
        stop.leave()
    finally:
      checkpoints.close()
  ema, state, fixed = state["ema"], None, None  # a device that gathers needs the room
  with cluster.explained():
    ema = cluster.gathered(mesh, ema)
  if first_host and (needs or not (workdir / "model").is_dir()):  # a rerun of a finished run leaves its records alone
    card = run_record(
      to_dict(config),
      steps=step,
      seed=t.seed,
      seconds=round(time.time() - began, 1),
      step_bytes=needs,
      peak_memory=peak_memory(),
    )
    write_json_atomic(workdir / "run.json", card)
    export_model(workdir / "model", ema, config, card)
  return workdir / "model"
