"""A residual and LayerNorm in one pass: XLA's form, and the Mosaic kernel in the interpreter and on a GPU, against float64."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.add_norm import Term, add_norm, api, mosaic_sm90, norm

EPS = 1e-6
# What a layer asks for: before attention, after it, after cross-attention.
KINDS = ("norm", "gated", "added")


def draw(kind="gated", b=2, r=30, d=1024, run=5, frames=3, dtype=jnp.bfloat16, own=True):
  """(x, term, scale, shift), and run and frames. own: each of a batch has its own vectors."""
  rng = np.random.default_rng(r + d)
  normal = lambda *s, of=dtype: jnp.asarray(rng.normal(size=s) + 0.5, of)
  vector = functools.partial(normal, b if own else 1, frames, d, of=jnp.promote_types(dtype, jnp.float32))
  term = Term(normal(b, r, d), normal(1, 1, d), vector() if kind == "gated" else None)
  affine = [normal(1, 1, d) for _ in range(2)] if kind == "gated" else [vector() for _ in range(2)]
  return (normal(b, r, d), None if kind == "norm" else term, *affine), run, frames


def excess(got, args, run, frames) -> float:
  """The largest error over what roundings allow: half an ulp of each result; of float32 some for each sum and product.

  LayerNorm is held to that of the rows that came out.
  """
  x, term, scale, shift = jax.tree.map(lambda a: np.asarray(a, np.float64), args)
  half, single = float(jnp.finfo(args[0].dtype).eps) / 2, 2.0**-22
  per_row = lambda a: a[:, np.arange(x.shape[1]) // run % frames if a.shape[1] > 1 else np.zeros(x.shape[1], int)]
  over = []

  def hold(a, want, sums):
    assert a.shape == x.shape and a.dtype == args[0].dtype
    over.append((abs(np.asarray(a, np.float64) - want) / (half * abs(want) + single * sums)).max())

  h = got
  if term is not None:
    y, h = got
    gate = 1 if term.gate is None else per_row(term.gate)
    added = (term.product + term.bias) * gate
    hold(y, x + added, abs(x) + (abs(term.product) + abs(term.bias)) * abs(gate))
    x = np.asarray(y, np.float64)
  centred = x - x.mean(-1, keepdims=True)
  size = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
  scale, shift = per_row(scale), per_row(shift)
  hold(
    h, centred * size * scale + shift, 4 * (abs(x) + abs(x).mean(-1, keepdims=True)) * size * abs(scale) + abs(shift)
  )
  return max(over)


def call(x, term, scale, shift, run, frames, **how):
  how = dict(run=run, frames=frames, eps=EPS, **how)
  return norm(x, scale, shift, **how) if term is None else add_norm(x, term, scale, shift, **how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("own", [True, False])
def test_by_xla(kind, dtype, own):
  args, *how = draw(kind, dtype=dtype, own=own)
  assert excess(call(*args, *how), args, *how) <= 1


@pytest.mark.parametrize(
  ("kind", "case"),
  [
    ("norm", dict()),
    ("gated", dict()),
    ("added", dict(own=False)),
    ("gated", dict(b=1, d=5120, r=12, run=2)),  # more than a thread holds of two rows
    ("added", dict(frames=1, run=4, r=8, dtype=jnp.float16)),
  ],
)
def test_the_kernel_in_the_interpreter(kind, case):
  args, *how = draw(kind, **case)
  got = mosaic_sm90.add_norm(*args, *how, EPS, interpret=plgpu.InterpretGPUParams(detect_races=True))
  races = interpreter.get_races().races_found
  interpreter.reset_gpu_interpret_mode_state()
  assert excess(got, args, *how) <= 1 and not races


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1024, 1536, 5120])
def test_lowers_for_cuda(kind, d):
  args, *how = draw(kind, d=d)
  kernel = jax.jit(lambda *a: mosaic_sm90.add_norm(*a, *how, EPS)).trace(*args)
  assert kernel.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [dict(b=1, r=4680, d=1536), dict(b=2, r=4680, d=5120), dict(b=3)], ids=str)
def test_the_kernel_on_a_gpu(kind, case):
  args, *how = draw(kind, **case)
  got = jax.jit(lambda *a: call(*a, *how, implementation="mosaic_sm90"))(*args)
  assert excess(got, args, *how) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_its_value_are_those_of_xla(monkeypatch, kind):
  args, *how = draw(kind, dtype=jnp.float32)
  plain = functools.partial(api.by_xla, *how, EPS)
  more = functools.partial(jax.tree.map, lambda a: a + 1)
  monkeypatch.setattr(mosaic_sm90, "add_norm", lambda *a: more(api.by_xla(*a[4:], *a[:4])))
  kernel = functools.partial(api._by_kernel, *how, EPS)
  jax.tree.map(np.testing.assert_array_equal, kernel(*args), more(plain(*args)))
  size = lambda f: lambda *x: sum((a**2).sum() for a in jax.tree.leaves(f(*x)))
  got, want = (jax.value_and_grad(size(f), range(4))(*args) for f in (kernel, plain))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (lambda x, t, a, b: (x[0], t, a, b), r"x: shape \(30, 1024\); want \[B,R,D\]"),
    (lambda x, t, a, b: (x[:, 1:], t, a, b), "x: 29 rows; want a multiple of run x frames, 5 x 3"),
    (
      lambda x, t, a, b: (x, t._replace(product=t.product[1:]), a, b),
      r"product: bfloat16\[1, 30, 1024\]; want x's bfloat16",
    ),
    (
      lambda x, t, a, b: (x, t._replace(gate=t.gate[:, :2]), a, b),
      r"gate: shape \(2, 2, 1024\); want \[2 or 1, 3 or 1, 1024\]",
    ),
    (lambda x, t, a, b: (x, t._replace(bias=t.bias[0]), a, b), r"bias: shape \(1, 1024\); want \[1, 1, 1024\]"),
    (lambda x, t, a, b: (x, t, a.astype(jnp.float16), b), "scale: dtype float16; want x's dtype bfloat16, or float32"),
    (lambda x, t, a, b: (x, t, a[..., 1:], b), r"scale: shape \(1, 1, 1023\)"),
    (lambda x, t, a, b: (x, t, a, b[0]), r"shift: shape \(1, 1024\)"),
  ],
)
def test_wrong_arguments(change, line):
  args, *how = draw()
  with pytest.raises(ValueError, match=line):
    call(*change(*args), *how)


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (dict(dtype=jnp.float32), "x: dtype float32; mosaic_sm90 wants bfloat16 or float16"),
    (dict(d=1280), "x: rows of 1280; mosaic_sm90 wants a multiple of 512 from 1024 to 8192"),
    (dict(d=512), "x: rows of 512"),
    (dict(d=8704), "x: rows of 8704"),
  ],
)
def test_what_the_kernel_cannot_do(monkeypatch, change, line):
  hopper = types.SimpleNamespace(compute_capability="9.0", device_kind="H")
  monkeypatch.setattr(mosaic_sm90, "current_device", lambda: hopper)
  args, *how = draw(**change)
  with pytest.raises(NotImplementedError, match=line):
    call(*args, *how, implementation="mosaic_sm90")


def test_the_kernel_wants_a_hopper_gpu():
  args, *how = draw()
  with pytest.raises(NotImplementedError, match="mosaic_sm90 wants a Hopper GPU"):
    call(*args, *how, implementation="mosaic_sm90")
