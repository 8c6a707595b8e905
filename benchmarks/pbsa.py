"""Speed of `pbsa` beside dense attention and other block-sparse kernels: one GPU, one process, one protocol.

python -m benchmarks.pbsa --out out/pbsa

A timed run is a burst of equal calls (`pallas_kernels.pbsa.timing`), PyTorch's kernels in the very same way. Only routing,
some short kernels, is timed as one program of many layers, one after the other, as in the model.

FLOPs are 4 x rows x keys read x H per head, keys that hold a token only; 2.5 times that backward. Bytes are q, k, v and
out once, gradients likewise. "By slots" counts padding, too, as a kernel multiplies it. The backward pass of "cudnn"
and "xla" gathers and attends again, because neither keeps what it gathered.

Letters: B batch, T query rows, S key slots, N heads, H head dim, Q query tiles, K key blocks.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pbsa import BLOCK, TILE, pbsa
from pallas_kernels.pbsa.timing import BURST, random_lists, timed
from sfjax import wan
from sfjax.errors import Parser, UserError, command
from sfjax.memory import KVMemory, route
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig, pool_keys, pool_queries
from sfjax.runlog import make_folder, replacing, run_record, write_json_atomic

IMPLEMENTATIONS = ("xla", "cudnn", "mosaic_sm90")  # the first is what the others are compared with
PASSES = {"forward": (1, 1), "backward": (2.5, 2), "both": (3.5, 3)}  # FLOPs and bytes over those of the forward pass
ROUTED_LAYERS = 16
PEAK_TFLOPS = 790.0  # what large bf16 matrix products sustain on an H100 or H200
PEAK_GBPS = {"H100": 2800.0, "H200": 4000.0}  # five sixths of the data sheet's


@dataclasses.dataclass(frozen=True)
class Shape:
  """One problem.

  Attributes:
    blocks: key blocks; prefix: how many of them every tile reads; listed: how many more a tile reads on average.
    valid: slots of a block that hold a token, unless it is short.
    model, memory: whose routing is timed, too, and whose chunks may end with a short block.
  """

  batch: int
  tiles: int
  heads: int
  head_dim: int
  blocks: int
  prefix: int
  listed: int
  valid: int = BLOCK
  model: ModelConfig | None = None
  memory: MemoryConfig | None = None

  @property
  def rows(self) -> int:
    return self.tiles * TILE

  @property
  def kv_short(self) -> tuple[range, int] | None:
    return self.model and self.model.layout.short_blocks(self.memory.window, self.memory.persistent)

  @property
  def sizes(self) -> Int32[np.ndarray, " K"]:
    """Valid slots of each block."""
    sizes, (short, few) = np.full(self.blocks, self.valid, np.int32), self.kv_short or ((), 0)
    sizes[list(short)] = few
    return sizes

  @property
  def keys(self) -> float:
    """How many a row reads on average, of random lists."""
    return float(self.prefix * self.valid + self.listed * self.sizes[self.prefix :].mean())

  @property
  def pairs(self) -> int:
    """Query rows times the keys they read, summed over heads."""
    return round(self.batch * self.heads * self.rows * self.keys)

  @property
  def q(self) -> tuple[int, int, int, int]:
    return self.batch, self.rows, self.heads, self.head_dim

  @property
  def kv(self) -> tuple[int, int, int, int]:
    return self.batch, self.blocks * BLOCK, self.heads, self.head_dim


def rollout_shape(model: ModelConfig, memory: MemoryConfig) -> Shape:
  """A chunk's attention to a full memory."""
  layout = model.layout
  blocks, listed = memory.resident_blocks(layout), memory.full_k(layout)
  sizes = 1, layout.blocks // 2, model.heads, model.head_dim, blocks, memory.persistent, listed, layout.valid
  return Shape(*sizes, model, memory)


def paper_shape(keys: int, top_k: float) -> Shape:
  """The paper's kernel benchmark: 4,608 rows, and 4,096 keys that all of them read."""
  blocks, prefix = keys // BLOCK, 4096 // BLOCK
  return Shape(1, 4608 // TILE, 12, 128, blocks, prefix, round(top_k * (blocks - prefix)))


def training_shape(model: ModelConfig, memory: MemoryConfig, batch: int, chunks: int) -> Shape:
  """So many chunks of a clip side by side, as in training: P is listed."""
  blocks = chunks * model.layout.blocks
  listed = memory.full_k(model.layout) + memory.persistent
  return Shape(batch, blocks // 2, model.heads, model.head_dim, blocks, 0, listed, model.layout.valid)


MEMORY = MemoryConfig(window=3, persistent=60, top_k=0.25)  # of all records
TILES = dict(tile=(3, 5, 4), block_tokens=0)  # a block is a tile, 60 of 64 slots, as in all records
SHAPES = {
  "production": rollout_shape(ModelConfig.wan_1_3b(**TILES), MEMORY),
  "packed": rollout_shape(ModelConfig.wan_1_3b(), wan.MEMORY["sparse"]),
  "paper 6.25%": paper_shape(65536, 0.0625),
  "paper 12.5%": paper_shape(65536, 0.125),
  "paper 25%": paper_shape(65536, 0.25),
  "14B": rollout_shape(ModelConfig.wan_14b(**TILES), MEMORY),
  "digits": training_shape(ModelConfig.digits(), MemoryConfig(window=2, persistent=16, top_k=0.25), 12, 13),
  "long": paper_shape(262144, 0.0625),
  "tiny": rollout_shape(
    ModelConfig.digits(dim=32, heads=2, latent_size=(16, 16)), MemoryConfig(window=2, persistent=2, top_k=0.5)
  ),
}


class Problem(NamedTuple):
  """A shape's arrays: inputs, cotangent of out, the lists, and which blocks each tile reads, prefix included."""

  x: tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N H"]]
  g: Float[Array, "B T N H"]
  ids: Int32[np.ndarray, "B N Q Kmax"]
  counts: Int32[np.ndarray, "B N Q"]
  read: Bool[np.ndarray, "B N Q K"]


class Group(NamedTuple):
  """Passes of one kernel on one problem.

  Attributes:
    prepare: pass -> a function that readies its inputs and returns the call to time.
    rows, keys, pairs: of a head's queries and keys, and of all heads' products.
    wait: until a call's result is there. host: a result as NumPy, [B,T,N,H], where it should equal pbsa's.
  """

  prepare: dict[str, Callable[[], Callable[[], Any]]]
  rows: int
  keys: int
  pairs: int
  wait: Callable[[Any], Any] = jax.block_until_ready
  host: Callable[[Any], np.ndarray] | None = None


def problem(shape: Shape, seed: int) -> Problem:
  """Normal bfloat16 data and random lists."""
  where = shape.batch, shape.heads, shape.tiles
  ids, counts = random_lists(np.random.default_rng(seed), where, shape.blocks, shape.prefix, shape.listed)
  read = np.zeros((*counts.shape, shape.blocks + 1), bool)  # the last column takes what lies past a count
  np.put_along_axis(read, ids, True, -1)
  read[..., : shape.prefix] = True
  keys = jax.random.split(jax.random.key(seed), 4)
  q, k, v, g = (
    jax.random.normal(key, size, jnp.bfloat16)
    for key, size in zip(keys, (shape.q, shape.kv, shape.kv, shape.q), strict=True)
  )
  return Problem((q, k, v), g, ids, counts, read[..., :-1])


def jax_passes(attend, x, lists, g) -> dict[str, Callable[[], Callable[[], Any]]]:
  """The passes of attend(*x, *lists), differentiated in x; residuals of "backward" are made before its call."""

  def vjp(x, lists):
    return jax.vjp(lambda *x: attend(*x, *lists), *x)

  def forward_and_backward(x, lists, g):
    out, pull = vjp(x, lists)
    return out, pull(g)

  def backward():
    pull = jax.jit(lambda x, lists: vjp(x, lists)[1])(x, lists)
    return functools.partial(jax.jit(lambda pull, g: pull(g)), pull, g)

  return {
    "forward": lambda: functools.partial(jax.jit(attend), *x, *lists),
    "backward": backward,
    "both": lambda: functools.partial(jax.jit(forward_and_backward), x, lists, g),
  }


def pbsa_group(shape: Shape, p: Problem, implementation: str) -> Group:
  """One implementation of pbsa."""

  def attend(q, k, v, ids, counts):
    more = dict(prefix_blocks=shape.prefix, kv_valid=shape.valid, kv_short=shape.kv_short)
    return pbsa(q, k, v, ids, counts, implementation=implementation, **more)

  lists = jnp.asarray(p.ids), jnp.asarray(p.counts)
  host = lambda out: np.asarray(out, np.float32)
  return Group(jax_passes(attend, p.x, lists, p.g), shape.rows, p.x[1].shape[1], shape.pairs, host=host)


def dense_group(shape: Shape, p: Problem, rows: int, keys: int) -> Group:
  """cuDNN's dense attention of the first rows to the first keys."""
  q, k, v = p.x
  attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
  passes = jax_passes(attend, (q[:, :rows], k[:, :keys], v[:, :keys]), (), p.g[:, :rows])
  return Group(passes, rows, keys, shape.batch * shape.heads * rows * keys)


def routing_layers(shape: Shape, layers: list[tuple]) -> list[tuple[Int32[Array, "B N Q Kmax"], Int32[Array, "B N Q"]]]:
  """Lists of every layer of a chunk, P being full: what a denoising pass does beside attention.

  Args:
    layers: of each, the chunk's own q and k [B,T,N,H], the memory's pooled keys [B,R,A,N,H], and its blocks' origins [B,N,R].
  """
  model, memory = shape.model, shape.memory
  chunk = jnp.int32(memory.window + memory.persistent)  # late enough
  own = memory.persistent + (chunk % memory.window) * model.layout.blocks
  lists = []
  for layer in layers:
    # Each waits for the layer before, as in a model: nothing is shared between them.
    (q, k, pooled, origin), *lists[-1:] = jax.lax.optimization_barrier((layer, *lists[-1:]))
    pooled_k = pool_keys(k, model.layout, memory.route_parts)
    pooled = jax.lax.dynamic_update_slice_in_dim(pooled, pooled_k, own, 1)
    m = KVMemory(*[None] * 2, pooled, None, origin, chunk, *[None] * 4)
    lists.append(route(model, memory, m, pool_queries(q, model.layout, memory.route_parts)))
  return lists


def routing_row(shape: Shape, runs: int) -> dict:
  """Time, FLOPs and bytes of one layer's routing."""
  layout, memory = shape.model.layout, shape.memory
  resident, patches = memory.resident_blocks(layout), memory.route_parts**2
  blocks = resident - memory.persistent
  queries = shape.tiles * (1 if patches == 1 else 2 * patches)
  sizes = shape.q, shape.q, (shape.batch, resident, patches, shape.heads, shape.head_dim)
  full = jnp.arange(resident - memory.persistent) % layout.blocks < layout.full_blocks
  origin = jnp.concatenate([jnp.zeros(memory.persistent, jnp.int32), jnp.where(full, 0, -1)])  # all that matters of it
  origin = jnp.broadcast_to(origin, (shape.batch, shape.heads, resident))
  layers = []
  for key in jax.random.split(jax.random.key(0), ROUTED_LAYERS):
    drawn = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(jax.random.split(key, 3), sizes, strict=True))
    layers.append((*drawn, origin))
  call = functools.partial(jax.jit(functools.partial(routing_layers, shape)), layers)
  per_head = shape.batch * shape.heads
  lists = per_head * shape.tiles * (memory.max_k(layout) + 1)
  moved = 2 * per_head * shape.head_dim * (2 * shape.rows + blocks * patches) + 4 * lists
  flops = 2 * per_head * queries * blocks * patches * shape.head_dim
  time = timed(call, jax.block_until_ready, runs)
  a_layer = {name: (np.array(time[name]) / ROUTED_LAYERS).tolist() for name in ("ms", "ms_p10_p90")}
  return time | a_layer | dict(flops=flops, bytes=moved)


def torch_passes(torch, attend, x, g) -> dict[str, Callable[[], Callable[[], Any]]]:
  """The passes of attend(*x) in PyTorch; the graph of "backward" is built before its call."""

  def leaves():
    return [t.detach().clone().requires_grad_() for t in x]

  def backward():
    own = leaves()
    return functools.partial(torch.autograd.grad, attend(*own), own, g, retain_graph=True)

  def both():
    own = leaves()
    return lambda: torch.autograd.grad(attend(*own), own, g)

  return {"forward": lambda: functools.partial(attend, *x), "backward": backward, "both": both}


def from_jax(torch, x) -> Any:
  """x [B,T,N,H] as a tensor [B,N,T,H], on the GPU where there is one."""
  device = "cuda" if torch.cuda.is_available() else "cpu"
  bits = torch.from_numpy(np.array(x).view(np.int16)).to(device)  # NumPy and PyTorch share no bfloat16
  return bits.view(torch.bfloat16).transpose(1, 2).contiguous()


def torch_group(torch, shape: Shape, attend, x, g, pairs: int | None = None) -> Group:
  """Groups what attends to tensors [B,N,T,H]; pairs are given where blocks are skipped as in pbsa."""
  rows, keys = x[0].shape[2], x[1].shape[2]
  host = lambda out: out.detach().transpose(1, 2).float().cpu().numpy()
  return Group(
    torch_passes(torch, attend, x, g),
    rows,
    keys,
    pairs or shape.batch * shape.heads * rows * keys,
    lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None,
    host if pairs else None,
  )


def sdpa_group(shape: Shape, p: Problem, backend: str, rows: int, keys: int) -> Group:
  """PyTorch's dense attention; FLASH_ATTENTION is FlashAttention-2."""
  import torch
  from torch.nn.attention import SDPBackend, sdpa_kernel

  def attend(q, k, v):
    with sdpa_kernel(getattr(SDPBackend, backend)):
      return torch.nn.functional.scaled_dot_product_attention(q, k, v)

  q, k, v = p.x
  x = [from_jax(torch, a) for a in (q[:, :rows], k[:, :keys], v[:, :keys])]
  return torch_group(torch, shape, attend, x, from_jax(torch, p.g[:, :rows]))


def block_mask(shape: Shape, p: Problem, tensor) -> Any:
  """FlexAttention's BlockMask of the very lists. Where blocks hold no padding, none needs a mask inside."""
  from torch.nn.attention.flex_attention import BlockMask

  sizes = tensor(shape.sizes)
  valid = lambda slot: shape.valid if shape.kv_short is None else sizes[slot // BLOCK]
  counts, ids = p.read.sum(-1), np.argsort(~p.read, -1, kind="stable")  # it wants every block in every list
  partial, full = (0 * counts, counts) if (shape.sizes == BLOCK).all() else (counts, 0 * counts)
  # The list of ids goes in as two tensors: compiled, one that plays two parts loses one of its names.
  return BlockMask.from_kv_blocks(
    *(tensor(a.astype(np.int32)) for a in (partial, ids, full, ids)),
    BLOCK_SIZE=(TILE, BLOCK),
    mask_mod=lambda batch, head, row, slot: slot % BLOCK < valid(slot),
    seq_lengths=(shape.rows, shape.blocks * BLOCK),
  )


def flex_group(shape: Shape, p: Problem) -> Group:
  """FlexAttention, compiled and tuned by its own autotuner, which alone finds tiles that fit blocks of 64."""
  import torch
  import torch._functorch.config
  from torch.nn.attention.flex_attention import flex_attention

  torch._dynamo.reset()  # or it counts earlier shapes as recompilations, and gives up
  torch._functorch.config.donated_buffer = False  # or a graph cannot be run backward twice
  x = [from_jax(torch, a) for a in p.x]
  mask = block_mask(shape, p, lambda a: torch.from_numpy(a).to(x[0].device))
  compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
  attend = lambda q, k, v: compiled(q, k, v, block_mask=mask)
  return torch_group(torch, shape, attend, x, from_jax(torch, p.g), shape.pairs)


def vsa_group(shape: Shape, p: Problem, folder: str | None) -> Group:
  """The Triton kernel of Video Sparse Attention from a clone of FastVideo, forward; its query tiles are 64 rows."""
  if not folder:
    raise ValueError("no --fastvideo DIR")
  path = next(pathlib.Path(folder).rglob("block_sparse_attn_triton.py"), None)
  if path is None:
    raise FileNotFoundError(f"{folder}: no block_sparse_attn_triton.py in it")
  import torch

  spec = importlib.util.spec_from_file_location("block_sparse_attn_triton", path)
  kernel = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(kernel)
  x = [from_jax(torch, a) for a in p.x]
  counts = p.read.sum(-1)
  ids = np.argsort(~p.read, -1, kind="stable")[..., : counts.max()]
  tensor = lambda a: torch.from_numpy(a.astype(np.int32)).to(x[0].device)
  by_block = [tensor(np.repeat(a, TILE // BLOCK, 2)) for a in (ids, counts)]
  sizes = tensor(shape.sizes)
  attend = lambda q, k, v: kernel.triton_block_sparse_attn_forward(q, k, v, *by_block, sizes)[0]
  group = torch_group(torch, shape, attend, x, None, shape.pairs)
  return group._replace(prepare={"forward": group.prepare["forward"]})


def groups(shape: Shape, p: Problem, fastvideo: str | None) -> dict[str, Callable[[], Group]]:
  """Everything that attends, by name."""
  equal = max(1, round(shape.keys / BLOCK)) * BLOCK  # keys
  every = int(shape.sizes[-2 * shape.tiles :].sum()), int(shape.sizes.sum())  # rows and keys without padding
  made = {f"pbsa {i}": functools.partial(pbsa_group, shape, p, i) for i in IMPLEMENTATIONS}
  return made | {
    "dense cudnn, equal keys": lambda: dense_group(shape, p, shape.rows, equal),
    "dense cudnn, all keys": lambda: dense_group(shape, p, *every),
    "torch flash, all keys": lambda: sdpa_group(shape, p, "FLASH_ATTENTION", *every),
    "torch cudnn, all keys": lambda: sdpa_group(shape, p, "CUDNN_ATTENTION", *every),
    "torch flex": lambda: flex_group(shape, p),
    "vsa triton": lambda: vsa_group(shape, p, fastvideo),
  }


def one_line(e: BaseException) -> str:
  """An exception as a reason."""
  return f"{type(e).__name__}: {' '.join(str(e).split())}"[:240]


def group_rows(make: Callable[[], Group], shape: Shape, runs: int, want: list):
  """Yields a row for every pass of a group; a pass that fails gives its reason, and none follows a failed forward pass.

  Args:
    want: the first forward result that is to be compared, as soon as there is one.
  """
  try:
    group = make()
  except Exception as e:  # whatever keeps a kernel from running is a result
    yield {"pass": "forward", "error": one_line(e)}
    return
  for name, prepare in group.prepare.items():
    flops, moved = PASSES[name]
    row = {"pass": name}
    row["flops"] = round(4 * group.pairs * shape.head_dim * flops)
    row["bytes"] = round(4 * shape.batch * shape.heads * shape.head_dim * (group.rows + group.keys) * moved)
    if group.host:  # a block-sparse kernel: it multiplies whole blocks
      row["slot_flops"] = round(row["flops"] * BLOCK * (shape.prefix + shape.listed) / shape.keys)
    try:
      call = prepare()
      row |= timed(call, group.wait, runs)
      if name == "forward" and group.host:
        out = group.host(call())
        if want:
          row["error_l2"] = float(np.linalg.norm(out - want[0]) / np.linalg.norm(want[0]))
        else:
          want.append(out)
    except Exception as e:
      row = {"pass": name, "error": one_line(e)}
    yield row
    if name == "forward" and "error" in row:
      return


def with_rates(row: dict, peak_tflops: float, peak_gbps: float) -> dict:
  """A row and what follows from its time: TFLOP/s, and the time that the roofline allows."""
  if "error" in row:
    return row
  roofline = max(row["flops"] / peak_tflops / 1e9, row["bytes"] / peak_gbps / 1e6)
  rates = {"tflops": row["flops"] / row["ms"] / 1e9, "roofline_ms": roofline}
  if "slot_flops" in row:
    rates["slot_tflops"] = row["slot_flops"] / row["ms"] / 1e9
  return row | rates


def measure(name: str, a: argparse.Namespace):
  """Yields the rows of a shape."""
  shape = SHAPES[name]
  wanted = lambda what: not a.only or any(word in what for word in a.only)
  p, want = problem(shape, a.seed), []
  for what, make in groups(shape, p, a.fastvideo).items():
    if wanted(what):
      for row in group_rows(make, shape, a.runs, want):
        yield {"shape": name, "what": what} | row
  if shape.memory and wanted("routing"):
    try:
      row = routing_row(shape, a.runs)
    except Exception as e:
      row = {"error": one_line(e)}
    yield {"shape": name, "what": "routing", "pass": "forward"} | row


def ratios(rows: list[dict]) -> dict[str, dict[str, float]]:
  """By shape: the fastest pbsa's forward speed over that of each peer, and routing's share of its time."""
  found = {}
  for shape in dict.fromkeys(r["shape"] for r in rows):
    ms = {r["what"]: r for r in rows if r["shape"] == shape and r["pass"] == "forward" and "ms" in r}
    own = [r for what, r in ms.items() if what.startswith("pbsa")]
    if not own:
      continue
    best = min(own, key=lambda r: r["ms"])
    found[shape] = {f"time of {what}": r["ms"] / best["ms"] for what, r in ms.items() if not what.startswith("pbsa")}
    if "dense cudnn, equal keys" in ms:  # the two may differ by half a block of keys: rates, not times
      found[shape]["TFLOP/s by slots over dense, equal keys"] = (
        best["slot_tflops"] / ms["dense cudnn, equal keys"]["tflops"]
      )
  return found


def describe(row: dict) -> str:
  """A row as a line of the table."""
  head = f"| {row['shape']} | {row['what']} | {row['pass']} | "
  if "error" in row:
    return f"{head}skipped: {row['error']} | | | | |"
  slots, error = row.get("slot_tflops"), row.get("error_l2")
  cells = f"{row['ms']:.3f} | {row['tflops']:.0f} | {'' if slots is None else f'{slots:.0f}'} | "
  return f"{head}{cells}{row['roofline_ms']:.3f} | {'' if error is None else f'{error:.1e}'} |"


def plot(rows: list[dict], peak_tflops: float, path: pathlib.Path) -> None:
  """Achieved TFLOP/s of every attention row, a panel a shape."""
  from matplotlib.figure import Figure

  rows = [r for r in rows if "tflops" in r and r["what"] != "routing"]
  shapes = list(dict.fromkeys(r["shape"] for r in rows))
  heights = [sum(r["shape"] == s for r in rows) for s in shapes] or [1]
  figure = Figure(figsize=(8, 1 + 0.25 * sum(heights) + 0.6 * len(heights)), layout="constrained")
  panels = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
  colours = dict(zip(PASSES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
  for ax, shape in zip(panels, shapes, strict=False):
    own = [r for r in rows if r["shape"] == shape]
    ax.barh(
      [f"{r['what']}, {r['pass']}" for r in own], [r["tflops"] for r in own], color=[colours[r["pass"]] for r in own]
    )
    ax.axvline(peak_tflops, color="black", linewidth=0.8, linestyle=":")
    ax.set_title(shape, loc="left", fontsize="small")
    ax.tick_params(labelsize="x-small")
    ax.invert_yaxis()
  panels[-1].set_xlabel("TFLOP/s on valid keys; dotted: the roofline's")
  with replacing(path) as part:
    figure.savefig(part, format="png", dpi=150)


def library_versions() -> dict[str, str]:
  """What `run_record` does not know: the accelerator's platform, and PyTorch and Triton if they were used."""
  found = {name: sys.modules[name].__version__ for name in ("torch", "triton") if name in sys.modules}
  return {"platform": jax.devices()[0].client.platform_version, **found}


@command
def main(argv: list[str]) -> None:
  """Times every shape, prints rows and a table, writes DIR/pbsa.json and DIR/pbsa.png."""
  p = Parser(prog="python -m benchmarks.pbsa", description=__doc__.splitlines()[0])
  words = list(dict.fromkeys(name.split()[0] for name in SHAPES))
  everything = [w for w in words if w != "tiny"]
  p.add_argument("--shape", nargs="+", choices=words, default=everything, help="default: all but tiny, for a CPU")
  p.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name has one of these words, e.g. pbsa routing")
  p.add_argument("--runs", type=int, default=20, help="timed bursts a row; the median counts")
  p.add_argument("--seed", type=int, default=0)
  p.add_argument("--fastvideo", metavar="DIR", help="a clone of FastVideo, for its Triton kernel")
  p.add_argument("--peak_tflops", type=float, default=PEAK_TFLOPS)
  p.add_argument("--peak_gbps", type=float, help="default: by device")
  p.add_argument("--out", default="out/pbsa")
  a = p.parse_args(argv)
  if a.runs < 1:
    raise UserError(f"--runs: {a.runs}; want 1 or more")
  out = make_folder(a.out, "--out")
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")  # the rest is PyTorch's
  if jax.default_backend() != "gpu" and a.shape != ["tiny"]:
    raise UserError("no NVIDIA GPU found; --shape tiny runs without")
  kind = jax.devices()[0].device_kind
  a.peak_gbps = a.peak_gbps or next((v for name, v in PEAK_GBPS.items() if name in kind), PEAK_GBPS["H200"])
  names = [name for name in SHAPES if name.split()[0] in a.shape]
  config = {name: dataclasses.asdict(SHAPES[name]) for name in names}
  header = "| shape | kernel | pass | ms | TFLOP/s | by slots | roofline ms | rel. error |\n" + "| --- " * 8 + "|"
  print(f"{kind}, median of {a.runs} bursts\n{header}", flush=True)
  rows = []
  for name in names:
    for row in measure(name, a):
      rows.append(with_rates(row, a.peak_tflops, a.peak_gbps))
      print(describe(rows[-1]), flush=True)
    protocol = {"runs": a.runs, "burst_s": BURST, "routed_layers": ROUTED_LAYERS, "text": __doc__}
    measured = {"rows": rows, "ratios": ratios(rows), "libraries": library_versions(), "protocol": protocol}
    write_json_atomic(out / "pbsa.json", run_record(config, flags=vars(a), **measured))  # a shape at a time: it may die
  plot(rows, a.peak_tflops, out / "pbsa.png")
  print("\n| shape | the fastest pbsa, forward |\n| --- | --- |")
  for name, found in ratios(rows).items():
    print(f"| {name} | " + ", ".join(f"{what} {x:.2f}" for what, x in found.items()) + " |")


if __name__ == "__main__":
  main(sys.argv[1:])
