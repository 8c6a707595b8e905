"""Configs: a locked ConfigDict from a python file, typed overrides from the command line, frozen dataclasses in the code."""

import dataclasses
import difflib
import importlib.util
import math
import pathlib
import types
import typing
from collections.abc import Iterator

from ml_collections import ConfigDict

from sfjax.distill import LEVELS, STUDENT_LOSSES
from sfjax.errors import UserError, check
from sfjax.flow import SamplerConfig
from sfjax.model import ModelConfig
from sfjax.rollout import CACHE_GRADIENTS
from sfjax.routing import MemoryConfig

OPTIMIZERS = ("adamw", "muon")
# What of a training state may lie in the host's memory between its uses.
OFFLOAD = {"none": (), "average": ("ema",), "optimizer": ("ema", "opt", "critic_opt")}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where clips come from.

  Attributes:
    source: "digits", "folder" (a folder of video files with captions), "latents" (what `sfjax.latents` made of
      one, for Wan2.1), "ode" (trajectories that `sfjax.ode` wrote), or "prompts" (a text file, one prompt a line, for
      training that needs no clips).
    path: the folder or file. fps: frames per second of the clips (digits: 16).
    colour_only, none: shares of captions without the class, and of empty ones; the rest names everything.
  """

  source: str = "digits"
  path: str = ""
  fps: float = 16.0
  colour_only: float = 0.2
  none: float = 0.1

  def __post_init__(self):
    check(
      self,
      ("fps", 0 < self.fps <= 1000, "a positive number, at most 1000"),
      ("colour_only", 0 <= self.colour_only <= 1, "a share, 0 to 1"),
      ("none", 0 <= self.none <= 1 - self.colour_only, f"a share, 0 to 1 - colour_only = {1 - self.colour_only:g}"),
    )


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of training with its own clips.

  Attributes:
    until: fraction of all steps at which the stage ends.
    chunks, batch: clip length and clips per step; a batch of 0 is one clip a device.
    dense: the whole clip is the window (no persistent blocks, no sparsity).
    p_memory: share of clips in which a digit is hidden. hide: shortest and longest hiding time in chunks.
    firsts: further clips of one chunk in every step. A first chunk is made from the prompt alone, and long clips show few.
    known: with a teacher: where a digit is hidden, rollouts begin with the real chunks that show and cover it, so many at most.
  """

  until: float
  chunks: int
  batch: int
  dense: bool = False
  p_memory: float = 0.0
  hide: tuple[int, int] = (1, 2)
  firsts: int = 0
  known: int = 0

  def __post_init__(self):
    check(
      self,
      ("chunks", self.chunks >= 1, "at least 1"),
      *((name, getattr(self, name) >= 0, "0 or more") for name in ("batch", "firsts", "known")),
      ("p_memory", 0 <= self.p_memory <= 1, "a share, 0 to 1"),
      ("hide", 1 <= self.hide[0] <= self.hide[1], "a shortest time of 1 or more and a longest"),
    )

  @property
  def parts(self) -> tuple["Stage", ...]:
    """The batches of a step: the clips, and the one-chunk clips beside them; a step's loss is the sum of theirs."""
    long = dataclasses.replace(self, firsts=0)
    short = dataclasses.replace(long, chunks=1, batch=self.firsts, dense=True, p_memory=0.0)
    return (long, short) if self.firsts else (long,)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Optimisation. `steps` counts batches; stages are fractions of it; `init` is a model folder to start from.

  Attributes:
    accumulate: batches to an optimiser's step. shift, context_noise, p_context_noise, p_known, p_drop_prompt: of teacher
      forcing.
    optimizer: "adamw", or "muon" for the matrices of the blocks with AdamW for the rest; `lr` fits both (equal update RMS).
    warmup: steps of linear warm-up. decay: last fraction of the steps, in which the rate falls linearly to a twentieth.
    betas: of Adam. patience: after so many steps in a row without a finite gradient, which change nothing, a run stops.
    threads: of the loader. workers: processes of the loader; 0 uses threads alone.
    fsdp: devices over which the weights, their average and the optimiser's state are split.
    context, tensor: devices, of one host, that work on the same clips: over `context` a clip's chunks are split, over
      `tensor` heads, their memory and the feed-forward.
    offload: what lies in the host's memory while a step does not need it: "none", "average" (of the weights), or "optimizer",
      the average and the optimisers' states; slower, and room for larger steps. When a run begins, all is on the device once.
  """

  steps: int
  stages: tuple[Stage, ...]
  optimizer: str = "adamw"
  lr: float = 1e-3
  betas: tuple[float, float] = (0.9, 0.99)
  warmup: int = 100
  decay: float = 0.4
  weight_decay: float = 0.01
  clip: float = 1.0
  patience: int = 10
  ema: float = 0.999
  accumulate: int = 1
  seed: int = 0
  init: str = ""
  shift: float = 5.0
  context_noise: float = 0.3
  p_context_noise: float = 0.5
  p_known: float = 0.1
  p_drop_prompt: float = 0.1
  importance_weight: float = 0.1
  log_every: int = 50
  save_every: int = 500
  keep_last: int = 2
  keep_every: int = 0
  threads: int = 4
  workers: int = 0
  fsdp: int = 1
  context: int = 1
  tensor: int = 1
  offload: str = "none"

  @property
  def together(self) -> int:
    """Devices that work on the same clips."""
    return self.context * self.tensor

  def __post_init__(self):
    ones = "steps", "accumulate", "patience", "log_every", "save_every", "keep_last", "threads"
    shares = "context_noise", "p_context_noise", "p_known", "p_drop_prompt"
    check(
      self,
      *((name, getattr(self, name) >= 1, "at least 1") for name in ones),
      *((name, getattr(self, name) >= 0, "0 or more") for name in ("warmup", "keep_every", "workers")),
      *((name, 0 <= getattr(self, name) <= 1, "0 to 1") for name in shares),
      *(
        (name, 0 <= getattr(self, name) < math.inf, "0 or more") for name in ("lr", "weight_decay", "importance_weight")
      ),
      *((name, getattr(self, name) > 0, "a positive number") for name in ("clip", "shift")),
      ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
      ("offload", self.offload in OFFLOAD, f"one of {', '.join(OFFLOAD)}"),
      ("decay", 0 < self.decay <= 1, "a fraction in (0, 1]"),
      ("betas", all(0 <= b < 1 for b in self.betas), "two fractions in [0, 1)"),
      ("ema", 0 <= self.ema < 1, "a fraction in [0, 1)"),
      ("seed", 0 <= self.seed < 2**31, "0 to 2147483647"),
    )
    ends = [s.until for s in self.stages]
    if not ends or ends != sorted(ends) or ends[-1] != 1.0:
      raise ValueError(f"stages: `until` is {ends}; want ascending fractions that end with 1.0")

  def stage_at(self, step: int) -> tuple[int, int]:
    """Index of the stage that a step belongs to, and how many steps of it came before."""
    first = 0
    for i, stage in enumerate(self.stages):
      end = round(stage.until * self.steps)
      if step < end or stage.until == 1.0:
        return i, step - first
      first = end


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """Distribution matching against a teacher (self_forcing section 4).

  Attributes:
    teacher: folder of a bidirectional model; "" trains on clips, without one. It judges the last `latents` of a rollout; a
      stage's `chunks` are the most that a rollout has.
    critic: folder of the model that the critic begins as; "" for the teacher's.
    latents: of the teacher's clips; 0 for as many as its chunk has (Wan2.1's converted folders tell a causal model's).
    guidance: the teacher's classifier-free guidance weight. negative: the prompt it leads away from.
    shift: of the noise levels that both scores judge at. levels: the least and the most noise.
    critic_updates: of the fake score, for one of the student. critic_lr: constant.
    loss: of the student, "dmd" or "sid". cache_gradient: what a kept key or value passes on, see `rollout.self_forcing`.
  """

  teacher: str = ""
  critic: str = ""
  latents: int = 0
  guidance: float = 4.0
  negative: str = ""
  shift: float = 5.0
  levels: tuple[float, float] = LEVELS
  critic_updates: int = 5
  critic_lr: float = 1e-4
  loss: str = "dmd"
  cache_gradient: str = "straight_through"

  def __post_init__(self):
    check(
      self,
      ("latents", self.latents >= 0, "0 or more"),
      ("guidance", self.guidance >= 0, "0 or more"),
      ("shift", 0 < self.shift < math.inf, "a positive number"),
      ("critic_lr", 0 <= self.critic_lr < math.inf, "0 or more"),
      ("levels", 0 < self.levels[0] < self.levels[1] < 1, "two of ascending sigma in (0, 1)"),
      ("critic_updates", self.critic_updates >= 1, "at least 1"),
      ("loss", self.loss in STUDENT_LOSSES, f"one of {', '.join(STUDENT_LOSSES)}"),
      ("cache_gradient", self.cache_gradient in CACHE_GRADIENTS, f"one of {', '.join(CACHE_GRADIENTS)}"),
    )


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment."""

  name: str
  model: ModelConfig
  memory: MemoryConfig
  sampler: SamplerConfig
  data: DataConfig
  train: TrainConfig
  distill: DistillConfig = DistillConfig()

  def __post_init__(self):
    known = [s.known for s in self.train.stages]
    if any(known) and not self.distill.teacher:
      raise ValueError(f"train.stages: known is {known}; want 0 without a distill.teacher")
    if self.memory.importance == "learned" and not self.model.importance_head:
      raise ValueError("memory.importance: 'learned'; want another with a model without model.importance_head")
    parts, (_, rows, columns) = self.memory.route_parts, self.model.tile
    if parts > 1 and self.model.block_tokens:
      raise ValueError(f"memory.route_parts: {parts}; want 1 with model.block_tokens {self.model.block_tokens}")
    if rows % parts or columns % parts:
      raise ValueError(
        f"memory.route_parts: {parts}; want a divisor of the rows and columns of model.tile {self.model.tile}"
      )

  def check_trains(self) -> None:
    """Raises UserError: rounded weights or slots, which carry no gradient and are for sampling alone."""
    if self.model.linear != ModelConfig.linear:
      raise UserError(f"config.model.linear: {self.model.linear}; want {ModelConfig.linear} in training")
    if self.memory.slots != MemoryConfig.slots:
      raise UserError(f"config.memory.slots: {self.memory.slots}; want {MemoryConfig.slots} in training")


def to_config_dict(config) -> ConfigDict:
  """A dataclass as a locked ConfigDict, ready for overrides; every value has its field's type (1 becomes 1.0)."""
  d = ConfigDict(to_dict(to_dataclass(type(config), to_dict(config))), convert_dict=True)
  return d.lock()


def to_dict(config) -> dict:
  """A dataclass as plain, JSON-able values."""
  if dataclasses.is_dataclass(config):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  return type(config)(to_dict(v) for v in config) if isinstance(config, tuple | list) else config


def _suggest(key: str, keys) -> str:
  near = difflib.get_close_matches(key, list(keys), 1)
  return f"did you mean {near[0]}?" if near else f"accepted are {', '.join(sorted(keys))}"


def _leaves(node: ConfigDict, where: str = "") -> Iterator[str]:
  for key, value in node.items():
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f"{where}{key}.")
    else:
      yield where + key


def _suggest_key(config: ConfigDict, node, key: str, part: str) -> str:
  """The key meant: `part` misspelt among its siblings in `node`, or else a key of that name in another section."""
  siblings = difflib.get_close_matches(part, list(node) if isinstance(node, ConfigDict) else [], 1)
  leaves = {leaf.rpartition(".")[2]: leaf for leaf in reversed(list(_leaves(config)))}
  elsewhere = difflib.get_close_matches(key.rpartition(".")[2], list(leaves), 1)
  if siblings:
    return f"did you mean --config.{'.'.join(siblings[0] if p == part else p for p in key.split('.'))}?"
  return f"did you mean --config.{leaves[elsewhere[0]]}?" if elsewhere else f"accepted are {', '.join(_leaves(config))}"


def load_config(spec: str, flag: str = "--config") -> ConfigDict:
  """`configs/digits.py:variant` -> its locked ConfigDict.

  Raises:
    UserError: no such file, no get_config in it, or a variant it does not know.
  """
  path, _, variant = spec.partition(":")
  if not pathlib.Path(path).is_file() or not path.endswith(".py"):
    raise UserError(f"{flag}: {path} is not a python file; want one such as configs/digits.py")
  module_spec = importlib.util.spec_from_file_location("sfjax_config", path)
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except (SyntaxError, UnicodeDecodeError) as e:
    raise UserError(f"{flag}: {path} is not readable Python: {e}") from e
  except Exception as e:
    raise UserError(f"{flag}: {path} fails: {type(e).__name__}: {e}") from e
  if not hasattr(module, "get_config"):
    raise UserError(f"{flag}: {path} defines no get_config(arg)")
  try:
    config = module.get_config(variant)
  except ValueError as e:
    raise UserError(f"{flag}: {spec}: {e}") from e
  except Exception as e:
    raise UserError(f"{flag}: {spec}: get_config({variant!r}) fails: {type(e).__name__}: {e}") from e
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"{flag}: {spec}: get_config gives a {type(config).__name__}; want a ConfigDict, see sfjax.config.to_config_dict"
    )
  return config.lock()


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
  """Takes `--config.a.b=value` and `--config.a.b value` out of a command line."""
  rest, found, i = [], {}, 0
  while i < len(argv):
    if argv[i].startswith("--config."):
      key, eq, value = argv[i].removeprefix("--config.").partition("=")
      if not eq:
        i += 1
        if i == len(argv):
          raise UserError(f"--config.{key}: a value is missing")
        value = argv[i]
      found[key] = value
    else:
      rest.append(argv[i])
    i += 1
  return rest, found


def _parse(key: str, text: str, old):
  try:
    if isinstance(old, ConfigDict):
      raise UserError(f"--config.{key}: is a section; set one of {', '.join(f'{key}.{k}' for k in _leaves(old))}")
    if isinstance(old, bool):
      return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
    if isinstance(old, tuple | list):
      if old and isinstance(old[0], dict | ConfigDict):
        raise UserError(f"--config.{key}: stages are set in the config file, not on the command line")
      kind = type(old[0]) if old else str
      return tuple(kind(v) for v in text.strip("()[] ").split(",") if v.strip())
    if old is None:
      return None if text.lower() == "none" else int(text)
    if text.lower() == "none" and isinstance(old, int):
      return None
    return type(old)(text)
  except (ValueError, KeyError) as e:
    raise UserError(f"--config.{key}: {text!r} is not accepted; want {type(old).__name__}, now {old!r}") from e


def read_config(spec: str, overrides: dict[str, str]) -> Config:
  """A `--config` file with the overrides beside it.

  Raises:
    UserError: as `load_config`, `apply_overrides` and `to_dataclass` do.
  """
  return to_dataclass(Config, apply_overrides(load_config(spec), overrides))


def apply_overrides(config: ConfigDict, overrides: dict[str, str]) -> ConfigDict:
  """Sets keys, each parsed as the type it has now.

  Raises:
    UserError: an unknown key (with the nearest one), or a value of another type.
  """
  for key, text in overrides.items():
    *path, leaf = key.split(".")
    node = config
    for part in [*path, leaf]:
      if not isinstance(node, ConfigDict) or part not in node:
        raise UserError(f"--config.{key}: no such key; {_suggest_key(config, node, key, part)}")
      parent, node = node, node[part]
    with parent.ignore_type():
      parent[leaf] = _parse(key, text, node)
  return config


def to_dataclass(cls, values, where: str = "config"):
  """A ConfigDict or dict as a frozen dataclass, nested ones included.

  Raises:
    UserError: an unknown or missing key, a value of another type, or one that the dataclass refuses.
  """
  if not isinstance(values, dict | ConfigDict):
    raise UserError(f"{where}: {values!r} is not accepted; want a section with {', '.join(typing.get_type_hints(cls))}")
  hints = typing.get_type_hints(cls)
  names = {f.name for f in dataclasses.fields(cls)}
  kw = {}
  for key, value in dict(values.items()).items():
    if key not in names:
      raise UserError(f"{where}.{key}: unknown key; {_suggest(key, names)}")
    kw[key] = _convert(hints[key], value, f"{where}.{key}")
  missing = [
    f.name
    for f in dataclasses.fields(cls)
    if f.name not in kw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise UserError(f"{where}: missing key {missing[0]!r}")
  try:
    return cls(**kw)
  except ValueError as e:
    raise UserError(f"{where}.{e}") from e


def _convert(hint, value, where):
  if dataclasses.is_dataclass(hint):
    return to_dataclass(hint, value, where)
  want = hint.__name__ if isinstance(hint, type) else str(hint)
  refused = UserError(f"{where}: {value!r} is not accepted; want {want}")
  if typing.get_origin(hint) is tuple:
    inner = typing.get_args(hint)
    if not isinstance(value, list | tuple) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
      raise refused
    return tuple(_convert(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value))
  if hint is float and type(value) is int:
    return float(value)
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  if type(value) not in options:
    raise refused
  return value
