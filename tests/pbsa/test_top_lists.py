"""The best entries of each row: the Mosaic kernel in the GPU interpreter and on a GPU, the same bits as XLA's sort."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pbsa import mosaic_sm90_lists, top_lists


def draw(rows: int, x: int) -> jax.Array:
  """Scores of every kind: few values and so many equals, negative ones, zeros of both signs, rows with little or nothing."""
  rng = np.random.default_rng(x)
  scores = rng.normal(size=(rows, x)).astype(np.float32)
  scores[1::4] = np.round(scores[1::4])
  scores[rng.uniform(size=scores.shape) < 0.1] = -np.inf
  scores[:, rng.integers(x, size=3)] = np.inf
  scores[2::8] = -np.inf
  scores[3::8, : x // 2] = 1e-40 * scores[3::8, : x // 2].clip(-1, 1)
  return jnp.asarray(scores)


@pytest.mark.parametrize(
  ("x", "budget", "size", "first"),
  [(234, 70, 119, 78), (234, 119, 119, 0), (32, 0, 5, 31), (70, 9, 64, 1), (7, 7, 7, 3)],
)
def test_the_kernel_in_the_interpreter(x, budget, size, first):
  scores = draw(8, x)
  want = top_lists(scores, budget, size, first)
  try:
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    got = mosaic_sm90_lists.top_lists(scores, jnp.int32(budget), size, jnp.int32(first), interpret=interpret)
    assert not interpreter.get_races().races_found
  finally:
    interpreter.reset_gpu_interpret_mode_state()
  for a, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, w)


def test_rows_under_vmap():
  scores = jnp.stack([draw(4, 70), draw(4, 70)[:, ::-1]])
  budget, first = jnp.array([20, 9]), jnp.array([3, 69])
  how = dict(size=20)
  want = jax.vmap(functools.partial(top_lists, **how))(scores, budget, first=first)
  try:
    kernel = functools.partial(
      mosaic_sm90_lists.top_lists, interpret=plgpu.InterpretGPUParams(detect_races=True), **how
    )
    got = jax.vmap(kernel)(scores, budget, first=first)
    assert not interpreter.get_races().races_found
  finally:
    interpreter.reset_gpu_interpret_mode_state()
  for a, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, w)


@pytest.fixture
def hopper(monkeypatch):
  fake = types.SimpleNamespace(compute_capability="9.0", device_kind="H100")
  monkeypatch.setattr(mosaic_sm90_lists, "current_device", lambda: fake)


def lowered(f, *shapes) -> str:
  return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("rows", "x", "size"), [((1, 12, 39), 234, 119), ((4, 3, 8), 48, 40), ((2, 2), 512, 300)])
def test_lowers_for_cuda(hopper, rows, x, size):
  number = jax.ShapeDtypeStruct((), jnp.int32)
  kernel = lambda *x: top_lists(x[0], x[1], size, x[2], implementation="mosaic_sm90")
  text = lowered(kernel, jax.ShapeDtypeStruct((*rows, x), jnp.float32), number, number)
  assert text.count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint])
def test_lists_under_a_gradient(hopper, wrap):
  def loss(x):  # the lists of several chunks side by side, as the parallel form makes them
    ids, _ = jax.vmap(lambda s, t: top_lists(s, 9 - t, 12, t, implementation="mosaic_sm90"))(x * 2, jnp.arange(3))
    return (jnp.take_along_axis(x, jnp.minimum(ids, 69), -1) ** 2).sum()

  text = lowered(jax.grad(wrap(loss)), jax.ShapeDtypeStruct((3, 8, 70), jnp.float32))
  assert text.count("@mosaic_gpu_v2") >= 1


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("rows", "x", "budget", "size", "first"), [(468, 234, 70, 119, 78), (1024, 512, 133, 300, 511)]
)
def test_the_kernel_on_a_gpu(rows, x, budget, size, first):
  scores = draw(rows, x)
  run = jax.jit(functools.partial(top_lists, size=size, implementation="mosaic_sm90"))
  with jax.default_device(jax.devices("cpu")[0]):
    want = top_lists(jnp.asarray(np.asarray(scores)), budget, size, first)
  for _ in range(20):
    for a, w in zip(run(scores, budget, first=first), want, strict=True):
      np.testing.assert_array_equal(a, w)


def test_what_it_refuses(hopper):
  scores = draw(8, 70)
  with pytest.raises(NotImplementedError, match="implementation: 'triton'"):
    top_lists(scores, 5, 5, implementation="triton")
  for other, line in ((scores.astype(jnp.bfloat16), "scores: dtype"), (scores[:6], "6.* rows of 70")):
    with pytest.raises(NotImplementedError, match=line):
      top_lists(other, 5, 5, implementation="mosaic_sm90")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it runs")
def test_elsewhere_it_is_refused():
  scores = draw(8, 70)
  with pytest.raises(NotImplementedError, match="wants a Hopper GPU"):
    top_lists(scores, 5, 5, implementation="mosaic_sm90")
