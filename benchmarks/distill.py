"""Time and bytes of distilling a model on one device, part by part, on random weights at full size; sparse against dense.

python -m benchmarks.distill --config configs/wan_1_3b.py:student --out out/distill

"step" is `training.jitted_step` as train.py runs it: one update of the student and one of the critic, the state donated; its
teacher and critic have the student's sizes, one clip. The other parts are programs of their own, on the same weights:

- "rollout": the student's rollout without gradient. "gradient": that, and its exit steps once more with their backward pass.
- "real", "fake": the two scores of a clip, the first with guidance. "critic": a whole update of the critic.
- "gradient_dense": "gradient" with a memory of all latents; what has a backward pass attends by cuDNN (elsewhere by XLA).
- "teacher_forcing", "teacher_forcing_dense": a training step on a clip, its state donated; the dense one attends by cuDNN.

A rollout's work grows linearly with the step that it exits at, so parts that roll out are timed at the first and at the last,
and their mean is that of all. Times are medians of --runs after one that is not counted. "held" and "workspace" are the bytes
of a program as XLA tells when it is compiled; "peak" is what the device had at most until then, so that it is the step's alone
where "step" runs first; "not_finite" counts steps whose gradient was not finite, which take as long. A part that does not fit
is left out. Parts add to what --out holds of the same config and device.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.realtime import random_weights
from sfjax import cluster, self_forcing, teacher_forcing, training
from sfjax.captions import Text
from sfjax.config import Config, read_config, split_overrides, to_dict
from sfjax.errors import Parser, UserError, command
from sfjax.runlog import keep_programs, make_folder, peak_memory, run_record, write_json_atomic

PARTS = (
  "step", "rollout", "gradient", "real", "fake", "critic", "gradient_dense", "teacher_forcing",
  "teacher_forcing_dense",
)  # fmt: skip
_FILE = "distill.json"


class Bench:
  """Random weights and inputs, and the parts as methods: name -> row."""

  def __init__(self, config: Config, runs: int):
    self.config, self.runs, self.mesh = config, runs, cluster.make_mesh()
    self.stage = training.with_batches(config).train.stages[0]
    model = config.model
    rows = jax.random.normal(jax.random.key(7), (2, 1, model.text_len, model.text_dim)).astype(model.dtype)
    self.text = Text(*(rows * (jnp.arange(model.text_len) < 40)[:, None]))
    shape = (1, self_forcing.teacher_model(config).chunk_frames, *model.latent_size, model.latent_channels)
    self.latents, self.sigma = jax.random.normal(jax.random.key(8), shape), jnp.full(shape[:2], 0.7)
    self.exits = {0: "first", config.sampler.steps - 1: "last"}

  def _random(self, like: dict, seed: int) -> dict:
    return random_weights(cluster.laid_out(self.mesh, like), seed)

  @functools.cached_property
  def params(self) -> dict:
    return self._random(teacher_forcing.abstract_model(self.config), 0)

  @functools.cached_property
  def critic(self) -> dict:
    return self._random(self_forcing.abstract_judge(self_forcing.critic_model(self.config)), 1)

  @functools.cached_property
  def teacher(self) -> dict:
    return self._random(self_forcing.abstract_judge(self_forcing.teacher_model(self.config)), 2)

  def forget(self) -> None:
    """Frees the weights."""
    for name in ("params", "critic", "teacher"):
      self.__dict__.pop(name, None)

  def timed(self, call, inputs) -> dict[str, float]:
    """Median seconds of `call` for each of the named inputs; call: input -> arrays to wait for."""
    medians = {}
    for name, x in inputs.items():
      seconds = []
      for _ in range(self.runs + 1):
        began = time.perf_counter()
        jax.block_until_ready(call(x))
        seconds.append(time.perf_counter() - began)
      medians[name] = float(np.median(seconds[1:]))
    return medians

  def row(self, jitted, args, call, inputs) -> dict:
    """A part's row. args: what is compiled for. call: (program, input) -> arrays to wait for."""
    began = time.perf_counter()
    program = jitted.lower(*args).compile()
    compiled = time.perf_counter() - began
    bytes_ = cluster.step_bytes(program)
    seconds = self.timed(functools.partial(call, program), inputs)
    mean = float(np.mean([*seconds.values()]))
    return {"s": mean, "seconds": seconds, "compile_s": compiled, "bytes": bytes_, "peak": peak_memory()["device"]}

  def _once(self, fn, *args) -> dict:
    return self.row(jax.jit(fn), args, lambda program, _: program(*args), {"all": None})

  def _step(self, held: list[dict], fixed, batches, jitted, steps: dict[str, int]) -> dict:
    """A training step: it consumes the state that is held, and leaves the next. steps: which of the run's to do."""
    self.forget()
    seen = []
    where = jax.tree.map(lambda x: x.sharding, held[0])

    def call(program, step):
      state = held.pop()
      state |= {"step": cluster.place(np.int32(step), where["step"])}
      state, metrics = program(state, fixed, batches)
      held.append(state)
      seen.append(metrics["skipped"])
      return metrics

    row = self.row(jitted(where), (held[0], fixed, batches), call, steps)
    return row | {"not_finite": sum(int(n > 0) for n in jax.device_get(seen))}

  def step(self) -> dict:
    of_exit = {int(self_forcing.drawn(self.config, self.stage, step)[1]): step for step in range(100)}
    batches = cluster.share(self.mesh, [((self.text, None), cluster.places(1))])
    make = lambda where: training.jitted_step(self.config, self.stage, self.mesh, where)
    steps = {name: of_exit[e] for e, name in self.exits.items()}
    state = self_forcing.state_of(self.config, self.params, self.critic, self.mesh)
    state = jax.device_put(state, training.where_kept(self.config, self.mesh, state))
    return self._step([state], self.teacher, batches, make, steps)

  def _rolled(self, config: Config, gradient: bool) -> dict:
    def play(params, prompt, exit_step):
      return self_forcing.student_rollout(config, params, prompt, jax.random.key(0), jnp.arange(1), 0, exit_step)

    def both(params, prompt, exit_step, g):
      latents, back = jax.vjp(lambda p: play(p, prompt, exit_step)[0], params)
      return latents, back(g)

    # What the head learns from is what the rollout leaves: the exit steps are not done once more for it.
    fn = jax.jit(both if gradient else lambda params, prompt, exit_step, g: play(params, prompt, exit_step)[1])
    args = lambda e: (self.params, self.text.prompt, jnp.int32(e), self.latents)
    call = lambda program, e: program(*args(e))
    return self.row(fn, args(0), call, {name: e for e, name in self.exits.items()})

  def rollout(self) -> dict:
    return self._rolled(self.config, False)

  def gradient(self) -> dict:
    return self._rolled(self.config, True)

  @property
  def _dense(self) -> Config:
    return dataclasses.replace(self.config, memory=self.config.memory.of_window(self.stage.chunks))

  def gradient_dense(self) -> dict:
    return self._rolled(self._dense, True)

  def real(self) -> dict:
    score = lambda teacher, text, x, sigma: self_forcing.real_score(self.config, teacher, text)(x, sigma)
    return self._once(score, self.teacher, self.text, self.latents, self.sigma)

  def fake(self) -> dict:
    score = lambda critic, text, x, sigma: self_forcing.fake_score(self.config, critic, text)(x, sigma)
    return self._once(score, self.critic, self.text, self.latents, self.sigma)

  def critic_update(self) -> dict:
    tx = self_forcing.critic_optimizer(self.config)
    held = [(self.critic, tx.init(self.critic))]
    self.__dict__.pop("critic")

    def learn(critic, opt, text, x):
      keys = jax.random.split(jax.random.key(1), 1)
      grads = jax.grad(lambda c: self_forcing.critic_loss(self.config, c, text.prompt, keys, x))(critic)
      updates, opt = tx.update(grads, opt, critic)
      return optax.apply_updates(critic, updates), opt

    def call(program, _):
      held.append(program(*held.pop(), self.text, self.latents))
      return held[0]

    return self.row(jax.jit(learn, donate_argnums=(0, 1)), (*held[0], self.text, self.latents), call, {"all": None})

  def _teacher_forced(self, dense: bool) -> dict:
    def of(config, stage, params, inputs, key, index):
      return teacher_forcing.loss(config, stage, params, *inputs, key, index)

    stage = dataclasses.replace(self.stage, dense=dense)
    step = functools.partial(teacher_forcing.step, self.config, stage, self.mesh, of=of)
    make = lambda where: jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    batches = cluster.share(self.mesh, [((self.latents, self.text), cluster.places(1))])
    state = teacher_forcing.state_of(self.config, self.params, self.mesh)
    return self._step([state], (), batches, make, {"all": 0})

  def teacher_forcing(self) -> dict:
    return self._teacher_forced(False)

  def teacher_forcing_dense(self) -> dict:
    return self._teacher_forced(True)

  def measure(self, part: str) -> dict:
    """A part's row; {"skipped": why} where it does not fit."""
    try:
      return getattr(self, "critic_update" if part == "critic" else part)()
    except UserError as e:
      return {"skipped": str(e)}
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      return {"skipped": str(e).splitlines()[0]}


def summary(rows: dict[str, dict]) -> dict:
  """What follows from the parts that were timed."""
  s, found = {name: row["s"] for name, row in rows.items() if "s" in row}, {}
  if {"step", "critic"} <= s.keys():
    found["step_of_5_critic_updates_s"] = s["step"] + 4 * s["critic"]
  if {"step", "rollout", "gradient", "real", "fake", "critic"} <= s.keys():
    parts = {name: s[name] for name in ("rollout", "real", "fake", "critic")}
    parts["exit_steps_with_backward"] = s["gradient"] - s["rollout"]
    parts["optimizer_average_and_rest"] = s["step"] - sum(parts.values())
    found["share_of_step"] = {name: x / s["step"] for name, x in parts.items()}
  if {"gradient", "gradient_dense"} <= s.keys():
    found["rollout_dense_over_sparse"] = s["gradient_dense"] / s["gradient"]
  if {"teacher_forcing", "teacher_forcing_dense"} <= s.keys():
    found["teacher_forcing_dense_over_sparse"] = s["teacher_forcing_dense"] / s["teacher_forcing"]
  return found


HEADER = "| part | s | at the first exit | at the last | compile, s | held, GB | workspace, GB |\n|---|---|---|---|---|---|---|"


def line(part: str, row: dict) -> str:
  """A row of the table."""
  if "skipped" in row:
    return f"| {part} | {row['skipped']} | | | | | |"
  ends = [f"{row['seconds'][name]:.3f}" if name in row["seconds"] else "" for name in ("first", "last")]
  sizes = [f"{row['bytes'][name] / 1e9:.2f}" for name in ("held", "workspace")]
  part += " (not finite)" if row.get("not_finite") else ""
  return "| " + " | ".join([part, f"{row['s']:.3f}", *ends, f"{row['compile_s']:.0f}", *sizes]) + " |"


def earlier(file: pathlib.Path, config: dict) -> dict[str, dict]:
  """Rows that are there of the same config and device."""
  try:
    found = json.loads(file.read_text())
    same = found["config"] == config and found["device"]["kind"] == jax.devices()[0].device_kind
    return found["parts"] if same else {}
  except (OSError, ValueError, KeyError):
    return {}


@command
def main(argv: list[str]) -> None:
  """Measures the parts and writes DIR/distill.json after each."""
  rest, overrides = split_overrides(argv)
  p = Parser(prog="python -m benchmarks.distill", description=__doc__.splitlines()[0])
  p.add_argument("--config", default="configs/wan_1_3b.py:student", metavar="FILE[:VARIANT]")
  p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
  p.add_argument("--runs", type=int, default=5, help="of each part, after one that is not counted")
  p.add_argument("--out", default="out/distill")
  a = p.parse_args(rest)
  if a.runs < 1:
    raise UserError(f"--runs: {a.runs}; want 1 or more")
  if jax.device_count() != 1:
    raise UserError(f"{jax.device_count()} devices; want one (CUDA_VISIBLE_DEVICES=0)")
  config = read_config(a.config, overrides)
  out = make_folder(a.out, "--out")
  keep_programs()
  plain = json.loads(json.dumps(to_dict(config)))
  rows = earlier(out / _FILE, plain)
  with tempfile.TemporaryDirectory() as folder:  # of a teacher like the student: a config, the weights are random
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(plain))
    distill = dataclasses.replace(config.distill, teacher=folder, critic_updates=1)
    bench = Bench(dataclasses.replace(config, distill=distill), a.runs)
    print(f"{jax.devices()[0].device_kind}\n{HEADER}", flush=True)
    for part in (part for part in PARTS if part in a.parts):
      rows[part] = bench.measure(part)
      print(line(part, rows[part]), flush=True)
      record = run_record(plain, flags=vars(a), parts=rows, summary=summary(rows), protocol=__doc__)
      write_json_atomic(out / _FILE, record)
  for name, x in summary(rows).items():
    print(f"{name}: {json.dumps(x) if isinstance(x, dict) else round(x, 3)}")
  if "peak" in rows.get("step", {}) and rows["step"]["peak"]:
    b = rows["step"]["bytes"]
    print(f"step: predicted {(b['held'] + b['workspace']) / 1e9:.2f} GB, peak {rows['step']['peak'] / 1e9:.2f} GB")


if __name__ == "__main__":
  main(sys.argv[1:])
