"""Configs: files, typed overrides, and dataclasses that refuse what they do not know."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfjax.config import (
  Config,
  Stage,
  TrainConfig,
  apply_overrides,
  load_config,
  split_overrides,
  to_config_dict,
  to_dataclass,
  to_dict,
)
from sfjax.errors import UserError
from sfjax.routing import MemoryConfig

DIGITS = "configs/digits.py"


@dataclasses.dataclass(frozen=True)
class Inner:
  width: int
  rate: float = 1.0
  shape: tuple[int, int] = (1, 2)
  cap: int | None = None
  on: bool = False

  def __post_init__(self):
    if self.width < 0:
      raise ValueError(f"width: {self.width}; want 0 or more")


@dataclasses.dataclass(frozen=True)
class Outer:
  name: str
  inner: Inner
  parts: tuple[Inner, ...] = ()


def tree():
  return to_config_dict(Outer("x", Inner(3)))


@pytest.mark.parametrize("variant", ["", "tiny", "dense", "window", "attention", "base", "student_memory"])
def test_roundtrip_of_every_variant(variant):
  config = to_dataclass(Config, load_config(f"{DIGITS}:{variant}"))
  assert isinstance(config.train.stages[0], Stage) and isinstance(config.model.tile, tuple)
  assert to_dataclass(Config, json.loads(json.dumps(to_dict(config)))) == config
  hash(config)  # it is a static argument of jitted functions


def test_locked():
  with pytest.raises(AttributeError, match='Did you mean "train"'):
    load_config(DIGITS).trian = 1


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "is not a python file"),
    ("x = 1", "defines no get_config"),
    ("def get_config(:", "not readable Python"),
    ("def get_config(arg):\n  raise ValueError('unknown variant; accepted are a, b')", "accepted are a, b"),
    ("import nosuchmodule", "fails: ModuleNotFoundError: No module named 'nosuchmodule'"),
    ("def get_config(): pass", r"get_config\('v'\) fails: TypeError"),
    ("def get_config(arg): return {}['x']", r"get_config\('v'\) fails: KeyError: 'x'"),
    ("def get_config(arg): return {}", "get_config gives a dict; want a ConfigDict"),
  ],
)
def test_bad_file(tmp_path, text, message):
  path = tmp_path / "c.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(UserError, match=message) as error:
    load_config(f"{path}:v")
  assert str(path) in str(error.value)


def test_not_python(tmp_path):
  (tmp_path / "c.yaml").write_text("a: 1")
  with pytest.raises(UserError, match="c.yaml is not a python file"):
    load_config(str(tmp_path / "c.yaml"))


def test_split_overrides():
  argv = ["--config", "c.py", "--config.a.b=1=2", "--workdir", "w", "--config.c", "-3"]
  assert split_overrides(argv) == (["--config", "c.py", "--workdir", "w"], {"a.b": "1=2", "c": "-3"})
  with pytest.raises(UserError, match=r"--config\.c: a value is missing"):
    split_overrides(["--config.c"])


def test_overrides_are_typed():
  new = {"inner.width": "7", "inner.rate": "2", "inner.shape": "(3, 4)", "inner.cap": "5", "inner.on": "true"}
  config = to_dataclass(Outer, apply_overrides(tree(), new | {"name": "1"}))
  assert config == Outer("1", Inner(7, 2.0, (3, 4), 5, True))
  assert type(config.inner.rate) is float
  assert to_dataclass(Outer, apply_overrides(tree(), {"inner.cap": "none"})).inner.cap is None


def test_int_given_for_a_float_stays_a_float():
  config = to_config_dict(Inner(3, rate=1))
  assert to_dataclass(Inner, apply_overrides(config, {"rate": "1.5"})).rate == 1.5


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("inner.widht", "1", "did you mean --config.inner.width?"),
    ("width", "1", "did you mean --config.inner.width?"),
    ("iner.width", "1", "did you mean --config.inner.width?"),
    ("zzz", "1", "accepted are inner.cap, "),
    ("name.x", "1", "no such key"),
    ("inner", "1", "is a section; set one of inner.cap"),
    ("inner.width", "1.5", "'1.5' is not accepted; want int"),
    ("inner.rate", "fast", "'fast' is not accepted; want float"),
    ("inner.on", "maybe", "'maybe' is not accepted; want bool"),
    ("inner.shape", "1,x", "'1,x' is not accepted"),
    ("inner.shape", "1,2,3", "want tuple[int, int]"),
    ("inner.width", "none", "None is not accepted; want int"),
    ("inner.width", "-1", "config.inner.width: -1; want 0 or more"),
  ],
)
def test_bad_override(key, value, message):
  with pytest.raises(UserError, match=re.escape(message)) as error:
    to_dataclass(Outer, apply_overrides(tree(), {key: value}))
  assert f"config.{key}" in str(error.value)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"name": "x", "inner": {"width": 1, "heigth": 2}}, "config.inner.heigth: unknown key; accepted are"),
    ({"name": "x", "inner": {"width": 1, "widt": 2}}, "config.inner.widt: unknown key; did you mean width?"),
    ({"name": "x"}, "config: missing key 'inner'"),
    ({"name": "x", "inner": {}}, "config.inner: missing key 'width'"),
    ({"name": "x", "inner": 3}, "config.inner: 3 is not accepted; want a section"),
    ({"name": "x", "inner": {"width": True}}, "config.inner.width: True is not accepted; want int"),
    ({"name": 1, "inner": {"width": 1}}, "config.name: 1 is not accepted; want str"),
    ({"name": "x", "inner": {"width": 1}, "parts": [{"width": -1}]}, "config.parts[0].width: -1; want 0 or more"),
    ([], "config: [] is not accepted"),
  ],
)
def test_bad_values(values, message):
  with pytest.raises(UserError, match=re.escape(message)):
    to_dataclass(Outer, values)


@given(st.builds(Inner, st.integers(0, 99), st.floats(0, 1), st.tuples(st.integers(), st.integers()), st.none()))
def test_roundtrip(inner):
  config = Outer("n", inner, (inner, inner))
  assert to_dataclass(Outer, json.loads(json.dumps(to_dict(config)))) == config
  assert to_dataclass(Outer, to_config_dict(config)) == config


def test_known_chunks_want_a_teacher():
  values = load_config(f"{DIGITS}:student_memory")
  with pytest.raises(UserError, match=r"^config\.train\.stages: known is \[4\]; want 0 without a distill\.teacher$"):
    to_dataclass(Config, apply_overrides(values.unlock(), {"distill.teacher": ""}))


def test_learned_importance_wants_a_head():
  values = apply_overrides(load_config(DIGITS), {"model.importance_head": "False"})
  with pytest.raises(
    UserError, match=r"^config\.memory\.importance: 'learned'; want another .* model\.importance_head$"
  ):
    to_dataclass(Config, values)


@pytest.mark.parametrize(
  "override, message",
  [
    ("train.lr=nan", "train.lr: nan; want 0 or more"),
    ("train.log_every=0", "train.log_every: 0; want at least 1"),
    ("train.keep_last=0", "train.keep_last: 0; want at least 1"),
    ("train.accumulate=0", "train.accumulate: 0; want at least 1"),
    ("train.workers=-1", "train.workers: -1; want 0 or more"),
    ("train.seed=-1", "train.seed: -1; want 0 to 2147483647"),
    ("train.betas=2,2", "train.betas: (2.0, 2.0); want two fractions in [0, 1)"),
    ("train.p_known=nan", "train.p_known: nan; want 0 to 1"),
    ("data.fps=nan", "data.fps: nan; want a positive number, at most 1000"),
    ("data.none=0.9", "data.none: 0.9; want a share, 0 to 1 - colour_only = 0.8"),
    ("memory.route_parts=3", "memory.route_parts: 3; want a divisor of the rows and columns of model.tile (3, 4, 4)"),
    ("model.block_tokens=48", "memory.route_parts: 2; want 1 with model.block_tokens 48"),
    ("model.layers=0", "model.layers: 0; want at least 1"),
    ("model.tile=3,4,0", "model.tile: (3, 4, 0); want numbers of at least 1"),
    ("model.latent_size=-32,32", "model.latent_size: (-32, 32); want numbers of at least 1"),
    ("model.param_dtype=int8", "model.param_dtype: 'int8'; want float32 or bfloat16"),
    ("sampler.shift=inf", "sampler.shift: inf; want a positive number"),
    ("distill.critic_lr=nan", "distill.critic_lr: nan; want 0 or more"),
  ],
)
def test_values_out_of_range(override, message):
  key, _, value = override.partition("=")
  with pytest.raises(UserError, match=re.escape(f"config.{message}")):
    to_dataclass(Config, apply_overrides(load_config(DIGITS), {key: value}))


def test_a_model_from_before_blocks_could_be_cut_anywhere_has_one_tile_in_each():
  values = load_config("configs/wan_1_3b.py").to_dict()
  assert values["model"].pop("block_tokens") == 64
  values["model"]["tile"] = (3, 5, 4)
  layout = to_dataclass(Config, values).model.layout
  assert (layout.valid, layout.blocks, layout.short) == (60, 78, 0)


def test_sinks_want_persistent_blocks():
  with pytest.raises(ValueError, match="sink_chunks: 1; want 0 without persistent blocks"):
    MemoryConfig(window=4, sink_chunks=1)


def test_stages_must_end():
  with pytest.raises(ValueError, match=re.escape("stages: `until` is [0.5]")):
    TrainConfig(steps=2, stages=(Stage(0.5, 1, 1),))
