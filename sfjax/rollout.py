"""The rollout: begin a chunk, denoise it against the memory, commit it; chunk after chunk, for sampling and training alike.

Letters: B videos, F latent frames of a chunk, h, w, C a latent frame, L layers, M text rows.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pbsa import BLOCK
from sfjax import memory as kv
from sfjax.attention import Replay, cached_attention, importance_loss, replayed_attention
from sfjax.axes import on_devices
from sfjax.flow import TIMESTEPS, SamplerConfig, denoise, few_step, renoise, to_x0
from sfjax.model import DiT, ModelConfig
from sfjax.routing import MemoryConfig, block_content


@functools.cache
def _abstract(model: ModelConfig):
  """Structure and abstract weights of the DiT."""
  return nnx.split(nnx.eval_shape(lambda: DiT(model, nnx.Rngs(params=0))))


def _module(model: ModelConfig, params) -> DiT:
  graph, state = _abstract(model)
  state = jax.tree.map(lambda x: x, state)  # a fresh container: the cached one stays abstract
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


def apply(model: ModelConfig, params, *args):
  """`DiT.__call__` as a function of its parameters (a pure dict)."""
  return _module(model, params)(*args)


def attended(model: ModelConfig, params, *args):
  """`DiT.attended`, likewise."""
  return _module(model, params).attended(*args)


def abstract_params(model: ModelConfig) -> dict:
  """Shapes and dtypes of the parameters as a pure dict."""
  plain = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # whatever mesh was set when the cached ones were found
  return jax.tree.map(plain, nnx.to_pure_dict(_abstract(model)[1]))


def init_params(model: ModelConfig, seed: int = 0) -> dict:
  """Random weights as a pure dict (self_forcing section 1.6)."""
  return nnx.to_pure_dict(nnx.state(DiT(model, nnx.Rngs(params=jax.random.key(seed, impl="rbg")))))


def for_compute(model: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
  """Weights that get no gradient, in the dtype they are used in, as each use would cast them; and their model."""
  model = dataclasses.replace(model, param_dtype=model.dtype)
  return model, jax.tree.map(lambda p, like: p.astype(like.dtype), params, abstract_params(model))


def start(
  model: ModelConfig, cfg: MemoryConfig, params, text: Float[Array, "B M E"], seed: int = 0, null_text=None
) -> kv.KVMemory:
  """An empty memory for a batch of prompts. With null_text (guidance) the batch is doubled: prompts first."""
  prompts = prompt_kv(model, params, text, null_text)
  return kv.init_memory(model, cfg, prompts, kv.row_keys(seed, prompts[0].shape[1]))


def text_kv(model: ModelConfig, params, text: Float[Array, "B M E"]):
  """`DiT.text_kv` as a function of its parameters."""
  return _module(model, params).text_kv(text)


def prompt_kv(model: ModelConfig, params, text: Float[Array, "B M E"], null_text=None):
  """`text_kv` of a memory's rows: the prompts', and with null_text (guidance) behind them as many of that."""
  rows = text if null_text is None else jnp.concatenate([text, jnp.broadcast_to(null_text, text.shape)])
  return text_kv(model, params, rows)


def chunk_keys(key: Array, sample: Int32[Array, "B"], chunk: Int32[Array, ""]) -> Array:
  """A key for each (run, sample, chunk), so that noise does not depend on the batch."""
  return jax.vmap(lambda s: jax.random.fold_in(jax.random.fold_in(key, s), chunk))(sample)


def _first_noise(model: ModelConfig, keys: Array) -> Float[Array, "B F h w C"]:
  """What a chunk is denoised from; keys: of `chunk_keys`."""
  shape = (model.chunk_frames, *model.latent_size, model.latent_channels)
  return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)


def _pass(
  model, cfg, memory: kv.KVMemory, x, sigma, commit: bool, in_place=False, prefix_k=None, keep=False, lists=None
) -> tuple:
  """The arguments of `apply` and `attended` for a pass of one chunk over the memory; x [rows,F,h,w,C].

  in_place: the carry is the memory's slots, and gets the chunk's keys and values; else the memory stays as it is.
  prefix_k, keep, lists, and the aux (read, update): see `cached_attention`.

  Raises:
    NotImplementedError: a memory of float8 slots not in place: they carry no gradient.
  """
  if not in_place and memory.k_scale is not None:
    raise NotImplementedError("in_place: False for float8 slots, which carry no gradient; want True")
  slots = kv.slots_of(memory) if in_place else None
  layer_inputs = memory.replace(**dict.fromkeys(slots)) if in_place else memory
  return (
    x[:, None],
    sigma[:, None] * TIMESTEPS,
    memory.chunk[:1],
    memory.text_kv,
    cached_attention(model, cfg, commit, prefix_k, keep),
    (layer_inputs, jnp.arange(model.layers) if in_place else None, lists),
    slots,
  )


def _forward(model, cfg, params, memory: kv.KVMemory, x, sigma, commit: bool, **how):
  """One pass of one chunk, see `_pass`: (output, memory, (read, update))."""
  out, slots, aux = apply(model, params, *_pass(model, cfg, memory, x, sigma, commit, **how))
  return out[:, 0], memory.replace(**slots or {}), aux


def commit(
  model: ModelConfig,
  cfg: MemoryConfig,
  params,
  memory: kv.KVMemory,
  x: Float[Array, "B F h w C"],
  sigma: Float[Array, "B F"] | None = None,
  **how,
) -> kv.KVMemory:
  """The pass over a begun chunk that gives final K/V and new scores. Under guidance both rows get the same latents.

  sigma: the latents' noise; clean by default. how: `in_place` and `prefix_k`, see `_pass`.
  """
  sigma = jnp.zeros(x.shape[:2]) if sigma is None else sigma
  x, sigma = (jnp.concatenate([a] * (memory.k.shape[1] // a.shape[0])) for a in (x, sigma))
  over = _pass(model, cfg, memory, x, sigma, True, **how)
  *_, slots, (_, update) = (attended if how.get("in_place") else apply)(model, params, *over)
  return kv.per_layer(kv.commit_chunk, model, cfg, memory.replace(**slots or {}), update)


def append_chunk(model: ModelConfig, cfg: MemoryConfig, params, memory: kv.KVMemory, x0, in_place=False) -> kv.KVMemory:
  """Puts a given clean chunk (a real prefix, say) into the memory. in_place: see `rollout_chunk`."""
  memory, how = _begin(model, cfg, memory, in_place)
  return commit(model, cfg, params, memory, x0, **how)


def _begin(model, cfg, memory: kv.KVMemory, in_place: bool):
  """The memory, begun for its next chunk, and how the chunk's passes go over it."""
  memory = kv.per_layer(kv.begin_chunk, model, cfg, memory)
  if not in_place:
    return memory, {}
  # Or XLA would turn P's keys from what the memory was before, and keep a copy of that.
  memory = memory.replace(k=jax.lax.optimization_barrier(memory.k))
  return memory, {"in_place": True, "prefix_k": kv.per_layer(kv.persistent_keys, model, cfg, memory)}


class Beginning(NamedTuple):
  """Real chunks that videos begin with: in the place of what would have been made there, for the memory as for who looks on.

  Attributes:
    latents: of the first k chunks. real: which of them to take; the others, and all from chunk k on, are made.
  """

  latents: Float[Array, "B k F h w C"]
  real: Bool[Array, "B k"]

  def given(self, chunk: Int32[Array, "*n"]) -> Bool[Array, "B *n"]:
    """In which videos the chunk of that number is real."""
    return jnp.take(self.real, chunk, 1, mode="fill", fill_value=False)

  def over(self, made: Float[Array, "B F h w C"], chunk: Int32[Array, ""]) -> Float[Array, "B F h w C"]:
    """A chunk that was made, real where it is given: there it passes no gradient on."""
    real = jnp.take(self.latents, chunk, 1, mode="clip")
    return jnp.where(self.given(chunk)[:, None, None, None, None], real, made)

  def committed(self, x: Float[Array, "B F h w C"], sigma: Float[Array, "B F"], chunk: Int32[Array, ""]):
    """What the pass that commits a chunk sees, latents and their noise: a real one is clean."""
    return self.over(x, chunk), jnp.where(self.given(chunk)[:, None], 0.0, sigma)


def rollout_chunk(
  model: ModelConfig,
  cfg: MemoryConfig,
  sampler: SamplerConfig,
  params,
  memory: kv.KVMemory,
  key: Array,
  sample: Int32[Array, "B"],
  known: Float[Array, "B F h w C"] | None = None,
  known_frames: Bool[Array, "F"] | None = None,
  in_place: bool = False,
  beginning: Beginning | None = None,
) -> tuple[Float[Array, "B F h w C"], kv.KVMemory]:
  """Begin, denoise, commit: one chunk of clean latents and the memory that contains it.

  Args:
    memory: of 2B rows (prompts, then null prompts) if sampler.guidance != 1.
    key: of the run; sample: index of every video, so that its noise does not depend on the batch.
    known, known_frames: conditioning latents, held at timestep 0 inside the chunk.
    in_place: for sampling: no pass copies the memory. Without, the chunk is differentiable.
    beginning: what is real of the videos; such a chunk is denoised for nothing, as shapes are the same for all, and
      committed clean; where the last step commits and lists are found once a chunk, by the first step's.
  """
  memory, how = _begin(model, cfg, memory, in_place)
  keys = chunk_keys(key, sample, memory.chunk[0])
  noise = _first_noise(model, keys)
  guided = sampler.guidance != 1

  def predict(finds, commits, x, sigma, state):
    written, lists, _ = state
    if commits and beginning is not None:
      x, sigma = beginning.committed(x, sigma, memory.chunk[0])
    if guided:
      x, sigma = jnp.concatenate([x, x]), jnp.concatenate([sigma, sigma])
    out, written, (read, update) = _forward(
      model, cfg, params, written or memory, x, sigma, commits, keep=finds, lists=lists, **how
    )
    if guided:
      with_prompt, without = jnp.split(out, 2)
      out = without + sampler.guidance * (with_prompt - without)
    return out, (written if in_place else None, (read.ids, read.counts) if finds else lists, update)

  # Without in_place nothing goes from step to step but x and lists, so nothing more is kept for the backward pass.
  x0, state = noise, (memory if in_place else None, None, None)
  for does, steps in _phases(sampler):
    x0, state = denoise(model, sampler, functools.partial(predict, *does), x0, keys, known, known_frames, state, steps)
  written, _, update = state
  memory = written or memory
  if beginning is not None:
    x0 = beginning.over(x0, memory.chunk[0])
  if update is not None:
    return x0, kv.per_layer(kv.commit_chunk, model, cfg, memory, update)
  return x0, commit(model, cfg, params, memory, x0, **how)


def _phases(sampler: SamplerConfig) -> list[tuple[tuple[bool, bool], range]]:
  """Steps that do the same: (whether one finds lists for the later ones, whether it commits the chunk), and which they are."""
  does = lambda i: (
    sampler.routing == "chunk" and i == 0 and sampler.steps > 1,
    sampler.commit == "last" and i == sampler.steps - 1,
  )
  same = [(what, list(steps)) for what, steps in itertools.groupby(range(sampler.steps), does)]
  return [(what, range(steps[0], steps[-1] + 1)) for what, steps in same]


def rollout(
  model: ModelConfig,
  cfg: MemoryConfig,
  sampler: SamplerConfig,
  params,
  memory: kv.KVMemory,
  key: Array,
  sample: Int32[Array, "B"],
  chunks: int,
) -> tuple[Float[Array, "B n F h w C"], kv.KVMemory]:
  """`chunks` chunks in one scan. Differentiable: a chunk's gradient flows through the memory."""
  latents, memory = _in_turn(lambda m: rollout_chunk(model, cfg, sampler, params, m, key, sample), memory, chunks)
  return jnp.moveaxis(latents, 0, 1), memory


def _in_turn(chunk, memory: kv.KVMemory, chunks: int):
  """chunk: memory -> (what it made, memory), so many times: all that was made on a leading axis, and the last memory."""

  def step(memory, _):
    made, memory = chunk(memory)
    return memory, made

  memory, made = jax.lax.scan(step, memory, length=chunks)
  return made, memory


class Looks(NamedTuple):
  """Pooled vectors of a self-forced rollout of n chunks, from which the importance head learns what was looked at.

  Attributes:
    queries: of the exit steps, by query tile and patch. keys: of the chunks as committed, by block and patch.
    content: mean values of their blocks, what the head sees.
  """

  queries: Float[Array, "L B n Q I N H"]
  keys: Float[Array, "L B n nb A N H"]
  content: Float[Array, "L B n nb N H"]


CACHE_GRADIENTS = ("straight_through", "detached")


def untrainable(sampler: SamplerConfig) -> str:
  """What of a sampler a self-forced rollout does not do, and what it wants; "" if all is well."""
  want = {"kind": "few_step", "guidance": 1, "routing": "step"}
  told = lambda found: ", ".join(f"{name} {found(name)}" for name in want)
  if all(getattr(sampler, name) == value for name, value in want.items()):
    return ""
  return f"{told(functools.partial(getattr, sampler))}; want {told(want.get)}"


def self_forcing(
  model: ModelConfig,
  cfg: MemoryConfig,
  sampler: SamplerConfig,
  params,
  memory: kv.KVMemory,
  key: Array,
  sample: Int32[Array, "B"],
  chunks: int,
  exit_step: Int32[Array, ""],
  cache_gradient: str = "straight_through",
  beginning: Beginning | None = None,
) -> tuple[Float[Array, "B n F h w C"], kv.KVMemory, Looks]:
  """A few-step student's own rollout, differentiable as Self-Forcing trains it (self_forcing section 4.2).

  Every chunk is denoised without gradient up to `exit_step`; that step's clean prediction is the chunk, with its gradient, and
  what the memory then gets in a pass without: clean, or, where the sampler commits its last step, at that step's noise, as
  early exits too must leave a memory such as sampling leaves. Gradients reach earlier chunks through their keys and values in
  the memory, in P as in the window: "straight_through" gives a kept one the gradient of its exit step's, "detached" none.

  First all is rolled out without gradient, the memory in place. Then the exit steps of all chunks are done once more, side by
  side, from what each of them started from and read: nothing but that pass is kept for the backward one, and no memory.

  A chunk that is real (`beginning`, counted from the video's first chunk) is denoised like the others, for nothing: the memory,
  the returned latents and the importance head's blocks are of the real one, and neither its latents nor its keys and values
  carry a gradient, as its exit step began from noise that has nothing to do with it.

  Args:
    sampler: one that is not `untrainable`. memory: of B rows. exit_step: 0 .. sampler.steps - 1.

  Raises:
    ValueError: another sampler, a memory of float8 slots, or an unknown cache_gradient.
  """
  if wrong := untrainable(sampler):
    raise ValueError(f"sampler: {wrong}")
  if cfg.slots != "model":
    raise ValueError(f"cfg: slots {cfg.slots}; want model")
  if cache_gradient not in CACHE_GRADIENTS:
    raise ValueError(f"cache_gradient: {cache_gradient!r}; want one of {', '.join(CACHE_GRADIENTS)}")
  constant = functools.partial(jax.tree.map, jax.lax.stop_gradient)
  before, sigmas, nb = constant(memory), jnp.asarray(sampler.sigmas), model.layout.blocks
  last = sampler.steps - 1
  quiet_model, fixed = for_compute(model, constant(params))

  def chunk(memory):
    memory, how = _begin(model, cfg, memory, in_place=True)
    keys = chunk_keys(key, sample, memory.chunk[0])
    noise = _first_noise(model, keys)
    level = lambda sigma: jnp.full(noise.shape[:2], sigma)
    pass_over = lambda memory, x, i, **more: _forward(
      quiet_model, cfg, fixed, memory, x, level(sigmas[i]), commit=False, **how, **more
    )

    def quiet(i, state):
      x, memory = state
      out, memory, _ = pass_over(memory, x, i)
      return few_step(model, sampler, x, out, i, keys), memory

    x, memory = jax.lax.fori_loop(0, exit_step, quiet, (noise, memory))
    out, memory, (read, _) = pass_over(memory, x, exit_step, keep=True)
    origins, first = memory.origin, kv.ring_block(model, cfg, memory.chunk[0])
    kept, sigma = to_x0(model, out, x, level(sigmas[exit_step])), level(0.0)
    if sampler.commit == "last":
      kept, sigma = jnp.where(exit_step == last, x, renoise(sampler, kept, last, keys)), level(sigmas[last])
    if beginning is not None:
      kept, sigma = beginning.committed(kept, sigma, memory.chunk[0])
    memory = commit(quiet_model, cfg, fixed, memory, kept, sigma, **how)
    own = lambda x, width: jax.lax.dynamic_slice_in_dim(x, first * width, nb * width, 2)
    k, v = own(memory.k, BLOCK), own(memory.v, BLOCK)
    content = jax.vmap(lambda v: block_content(v, model.layout))(v)
    return (x, k, v, origins, read, own(memory.pooled, 1), content), memory

  made, after = _in_turn(chunk, before, chunks)
  x, (k, v, origins, read, pooled, content) = made[0], jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), made[1:])
  x, first = jnp.moveaxis(x, 0, 1), before.chunk[0]
  numbers = first + jnp.arange(chunks)
  sigma = jnp.full(x.shape[:3], sigmas[exit_step])
  out, *_ = apply(
    model,
    params,
    x,
    sigma * TIMESTEPS,
    numbers,
    memory.text_kv,
    replayed_attention(model, cfg, first, cache_gradient == "straight_through", beginning and beginning.given(numbers)),
    Replay(before.k, before.v, before.origin, k, v, origins, read.ids, read.counts),
  )
  looks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), Looks(read.queries, pooled, content))
  x0 = to_x0(model, out, x, sigma)
  if beginning is not None:
    x0 = jax.vmap(beginning.over, (1, 0), 1)(x0, numbers)
  return x0, after, looks


def head_loss(model: ModelConfig, cfg: MemoryConfig, params, looks: Looks) -> Float[Array, ""]:
  """`attention.importance_loss` on a student's own rollout, mean over layers; the gradient is the importance head's alone."""
  layers, b, n, nb = looks.content.shape[:4]
  predicted = _module(model, params).log_importance(looks.content.reshape(layers, b, n * nb, *looks.content.shape[4:]))
  one = functools.partial(importance_loss, model, min(cfg.window, n), n)
  return jax.vmap(one)(predicted, looks.queries, looks.keys).mean()


_WHOLE, _MEMORY = PartitionSpec(), kv.split("tokens")  # how a mesh has arrays
# For NVIDIA GPUs: products by cuBLAS, which reads weights where they lie and joins a bias and GELU, and each on its own.
_COMPILER = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """The rollout's programs, jitted whole, the memory donated; on a mesh each device has its rows of a chunk, and its heads of
  the memory.

  Attributes:
    mesh: the devices, all of them along "tokens"; None for one.
  """

  model: ModelConfig
  memory: MemoryConfig
  sampler: SamplerConfig
  mesh: Mesh | None = None

  def _jit(self, fn, takes, returns, **how):
    """takes, returns: how what the program is given and what it returns are split on a mesh."""
    if self.mesh is None:
      return jax.jit(fn, **how)
    own = on_devices(fn, self.mesh, tuple(takes), returns)
    return jax.jit(own, out_shardings=jax.tree.map(lambda s: NamedSharding(self.mesh, s), returns), **how)

  @functools.cached_property
  def chunk(self):
    """(params, memory, key, sample, known, known_frames) -> (latents, memory)."""
    chunk = functools.partial(rollout_chunk, self.model, self.memory, self.sampler, in_place=True)
    takes = _WHOLE, _MEMORY, *[_WHOLE] * 4
    return self._jit(chunk, takes, (_WHOLE, _MEMORY), donate_argnums=1, compiler_options=_COMPILER)

  @functools.cached_property
  def append(self):
    """(params, memory, x0) -> memory."""
    append = functools.partial(append_chunk, self.model, self.memory, in_place=True)
    return self._jit(append, (_WHOLE, _MEMORY, _WHOLE), _MEMORY, donate_argnums=1, compiler_options=_COMPILER)

  @functools.cached_property
  def start(self):
    """(params, text, seed, null_text) -> memory."""
    return self._jit(functools.partial(start, self.model, self.memory), [_WHOLE] * 4, _MEMORY)

  @functools.cached_property
  def prompt(self):
    """(params, text, null_text) -> `prompt_kv`."""
    return self._jit(functools.partial(prompt_kv, self.model), [_WHOLE] * 3, _MEMORY.text_kv)
