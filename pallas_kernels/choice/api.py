"""The public call: `pbsa.top_lists`, in one kernel where there is one."""

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels import pbsa
from pallas_kernels.choice import mosaic_sm90

IMPLEMENTATIONS = ("mosaic_sm90", "xla")


def top_lists(
  scores: Float[Array, "*B X"],
  budget: int | Int32[Array, ""],
  size: int,
  first: int | Int32[Array, ""] = 0,
  *,
  implementation: str | None = None,
) -> tuple[Int32[Array, "*B {size}"], Int32[Array, "*B"]]:
  """The best entries of every row as a list for `pbsa`: the bits of `pbsa.top_lists`. No gradient.

  Args:
    scores: float32 without NaN. budget, size, first: see `pbsa.top_lists`.
    implementation: "mosaic_sm90" (Hopper, float32), "xla" (anywhere), or None for the first that supports the arguments.

  Raises:
    ValueError: size is not in 1..X. NotImplementedError: the implementation cannot do this.
  """
  if not 1 <= size <= scores.shape[-1]:
    raise ValueError(f"size: {size}; want 1..{scores.shape[-1]}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise NotImplementedError(f"implementation: {implementation!r}; this build has {', '.join(IMPLEMENTATIONS)}")
  scores = jax.lax.stop_gradient(scores)
  if implementation in (None, "mosaic_sm90"):
    reason = mosaic_sm90.unsupported(scores)
    if implementation and reason:
      raise NotImplementedError(reason)
    if reason is None:
      ids, counts = mosaic_sm90.top_lists(scores.reshape(-1, scores.shape[-1]), budget, size, first)
      return ids.reshape(*scores.shape[:-1], size), counts.reshape(scores.shape[:-1])
  return pbsa.top_lists(scores, budget, size, first)
