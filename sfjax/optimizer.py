"""Optimisers: AdamW or Muon under one schedule, clipped, with decay for matrices alone; and the running average of weights.

A gradient that is not finite moves nothing; how many came in a row is counted.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from sfjax import cluster
from sfjax.config import TrainConfig


def learning_rate(t: TrainConfig) -> optax.Schedule:
  """Linear warm-up, constant, linear decay to a twentieth, over the optimiser's steps: every `accumulate`-th of the run's."""
  steps = max(1, t.steps // t.accumulate)
  warmup = min(t.warmup, steps - 1)
  decay = max(1, min(round(t.decay * steps), steps - warmup))
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, t.lr, warmup),
      optax.constant_schedule(t.lr),
      optax.linear_schedule(t.lr, 0.05 * t.lr, decay),
    ],
    [warmup, steps - decay],
  )


def _is_matrix(path, x) -> bool:
  """Whether a parameter is a Linear's matrix (or a stack of them); biases, gains and embeddings are not."""
  return getattr(path[-1], "key", None) == "kernel"


def matrices(params):
  """Which parameters decay, in the structure of `params`."""
  return jax.tree_util.tree_map_with_path(_is_matrix, params)


def optimizer(t: TrainConfig) -> optax.GradientTransformation:
  """AdamW or Muon with the schedule of `learning_rate` and clipping; matrices alone decay."""
  (b1, b2), rate = t.betas, learning_rate(t)
  if t.optimizer == "adamw":
    tx = optax.adamw(rate, b1=b1, b2=b2, weight_decay=t.weight_decay, mask=matrices)
  else:

    def orthogonal(p):  # the blocks' matrices, stacked over layers
      axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
      return jax.tree_util.tree_map_with_path(lambda path, x: axes if _is_matrix(path, x) and x.ndim == 3 else None, p)

    tx = optax.contrib.muon(
      rate,
      weight_decay=t.weight_decay,
      weight_decay_mask=matrices,
      adam_b1=b1,
      adam_b2=b2,
      adam_weight_decay=t.weight_decay,
      muon_weight_dimension_numbers=orthogonal,
      consistent_rms=0.2,  # updates as large as Adam's, so that one learning rate serves both
    )
  tx = optax.chain(optax.clip_by_global_norm(t.clip), tx)
  return only_finite(tx if t.accumulate == 1 else optax.MultiSteps(tx, t.accumulate).gradient_transformation())


def begun(tx: optax.GradientTransformation, params, mesh: Mesh | None = None):
  """An optimiser's state before its first step; with a mesh no device ever holds more than its part."""
  if mesh is None:
    return tx.init(params)
  return jax.jit(tx.init, out_shardings=cluster.shardings(mesh, jax.eval_shape(tx.init, params)))(params)


def only_finite(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """The same, but a gradient with a number that is not finite changes neither parameters nor the optimiser's state.

  As `optax.apply_if_finite` with its state; chosen number by number, since a branch would hold the whole state twice.
  """

  def init(params):
    zero = lambda: jnp.zeros((), jnp.int32)  # one of its own each: a step consumes them
    return optax.ApplyIfFiniteState(zero(), jnp.array(True), zero(), tx.init(params))

  def update(grads, state, params=None):
    grads, inner = cluster.fetched(grads, state.inner_state)
    finite = jnp.all(jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]))
    bad = (~finite).astype(jnp.int32)
    updates, new = tx.update(grads, inner, params)
    chosen = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    state = optax.ApplyIfFiniteState(
      (state.notfinite_count + 1) * bad, finite, state.total_notfinite + bad, chosen(new, inner)
    )
    return chosen(updates, jax.tree.map(jnp.zeros_like, updates)), state

  return optax.GradientTransformation(init, update)


def skipped(opt) -> Int32[Array, ""]:
  """How many gradients in a row, up to now, an optimiser's state has seen that were not finite."""
  return opt.notfinite_count


def averaged(decay: float, step: Int32[Array, ""], ema, params, opt):
  """The running average after one more step; the first steps weigh more, one that changed nothing not at all.

  Such are those whose gradient `opt` skipped, and, where gradients are accumulated, all but the last of each update's.
  """
  still = skipped(opt) > 0
  if isinstance(opt.inner_state, optax.MultiStepsState):
    still |= opt.inner_state.mini_step > 0
    step = opt.inner_state.gradient_step - 1
  decay = jnp.where(still, 1.0, jnp.minimum(decay, (1.0 + step) / (10.0 + step)))
  params, ema = cluster.fetched(params, ema)
  return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
