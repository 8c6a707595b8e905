"""UMT5 against transformers' encoder and tokenizer (fixtures by tests/fixtures/make_umt5.py), its keys, and the cache."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import keys, umt5_keys
from sfjax.errors import UserError
from sfjax.tensors import of_arrays
from sfjax.text_cache import TextCache
from sfjax.umt5 import (
  UMT5Config,
  UMT5Encoder,
  abstract_umt5,
  apply_umt5,
  clean_prompt,
  init_umt5,
  relative_buckets,
)
from tests.fixtures.seeded import weight

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
ORACLE = dict(np.load(FIXTURES / "umt5.npz"))
TOKENS = json.loads((FIXTURES / "umt5_tokens.json").read_text())
TOKENIZER = str(FIXTURES / "umt5_tokenizer.json")
EXACT = UMT5Config(
  vocab=200, dim=32, heads=4, head_dim=8, ffn_dim=64, layers=3, dtype="float32", param_dtype="float32"
)  # fmt: skip
HALF = dataclasses.replace(EXACT, dtype="bfloat16", param_dtype="bfloat16")


def official(cfg=EXACT):
  return {name: weight(name, shape).astype(np.float32) for name, shape in umt5_keys.shapes(cfg).items()}


def from_official(cfg, arrays, source="t5.pth"):
  return keys.read(umt5_keys.arrays(cfg, of_arrays(arrays), source, np.dtype(cfg.param_dtype)))


@pytest.fixture(scope="module")
def params():
  return from_official(EXACT, official())


def encode(cfg, params, ids):
  return np.asarray(jax.jit(UMT5Encoder("", ids.shape[1], cfg).encode)(params, ids))


forward = jax.jit(apply_umt5, static_argnums=0)


def distance(a, b):
  return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)


def refused(call, *parts):
  """The call ends with a UserError of one line that has these parts."""
  with pytest.raises(UserError) as e:
    call()
  assert "\n" not in str(e.value)
  for part in parts:
    assert part in str(e.value)


# The encoder.


@pytest.mark.parametrize("case", ["short", "long"])
def test_encoder_equals_transformers(params, case):
  ids, want = ORACLE[f"{case}_ids"], ORACLE[case]
  out = encode(EXACT, params, ids)
  assert out.shape == want.shape and out.dtype == np.float32
  for row, expected in zip(out, want, strict=True):  # each prompt on its own
    assert distance(row, expected) <= 1e-5
  assert (out[ids == 0] == 0).all() and (out[ids != 0] != 0).any(-1).all()


def test_the_long_prompt_reads_every_bucket(params):
  ids, want = ORACLE["long_ids"], ORACLE["long"]
  length = int((ids != 0).sum())
  assert set(np.unique(relative_buckets(length))) == set(range(32)) - {16}  # 16 would be "after, by 0"
  for bucket in (15, 31):  # distances of 91 and more, either side
    table = params["layers"]["position"].copy()
    table[:, bucket] += 0.1
    changed = {**params, "layers": {**params["layers"], "position": table}}
    assert distance(encode(EXACT, changed, ids), want) > 1e-3


def test_buckets_are_those_of_transformers():
  ahead = np.arange(-300, 301)
  ours = relative_buckets(301)
  assert (ours[300] == ORACLE["buckets"][:301]).all() and (ours[0] == ORACLE["buckets"][300:]).all()
  assert ours[100, 107] == ORACLE["buckets"][ahead == 7][0]  # a key after its query


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (16, 64), (64, 1000)])
def test_buckets_follow_the_formula(buckets, far):
  exact = buckets // 4
  want = np.zeros((far + 30,) * 2, int)
  for i, j in np.ndindex(want.shape):
    d = abs(j - i)
    if d >= exact:
      place = math.log2(d / exact) / math.log2(far / exact) * (buckets // 2 - exact)
      d = min(exact + math.floor(place + 1e-9), buckets // 2 - 1)
    want[i, j] = d + buckets // 2 * (j > i)
  assert (relative_buckets(len(want), buckets, far) == want).all()


def test_bfloat16_errs_as_its_roundings_and_no_more_than_torch():
  ids, exact = ORACLE["short_ids"], ORACLE["short"]
  half = from_official(HALF, official())
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(half))
  out = encode(HALF, half, ids)
  assert out.dtype == jnp.bfloat16
  error = distance(out, exact)
  own = distance(encode(EXACT, jax.tree.map(lambda x: x.astype(np.float32), half), ids), exact)
  # A layer rounds 7 matrices and some 14 activations, independent errors of one size: sqrt(1 + 14/7) = 1.7 times what the
  # weights alone do; half of that on either side for correlation (residuals are rounded again and again).
  assert 1.7 / 1.5 * own < error < 1.7 * 1.5 * own
  # Torch also rounds the logits, which we keep in float32: one more rounding, so there is no reason to be worse.
  assert error <= distance(ORACLE["short_bfloat16"], exact)


def test_bfloat16_keeps_logits_and_softmax_in_float32():
  half = from_official(HALF, official())

  def out(
    cfg, bias
  ):  # the same for every pair, so softmax does not see it; in bfloat16, logits near 256 are 1 or 2 apart
    layers = {**half["layers"], "position": np.full_like(half["layers"]["position"], bias)}
    return encode(cfg, {**half, "layers": layers}, ORACLE["short_ids"]).astype(np.float64)

  # Float32 logits near 256 are 3e-5 apart: a few probabilities round to bfloat16 the other way, less than all that rounds.
  assert distance(out(HALF, 256), out(HALF, 0)) < distance(out(HALF, 0), out(EXACT, 0))


def test_what_is_past_the_end_changes_nothing(params):
  ids = ORACLE["short_ids"]
  lengths = (ids != 0).sum(1).astype(np.int32)
  past = np.arange(ids.shape[1]) >= lengths[:, None]
  out = np.asarray(forward(EXACT, params, ids, lengths))
  garbage = np.where(past, 77, ids)
  assert (np.asarray(forward(EXACT, params, garbage, lengths)) == out).all()
  loud = params["embedding"].copy()
  loud[0] = 1e4
  assert (np.asarray(forward(EXACT, {**params, "embedding": loud}, ids, lengths)) == out).all()
  inside = ids.copy()
  inside[:, 2] = 77
  changed = np.asarray(forward(EXACT, params, inside, lengths))
  assert (np.abs(changed - out)[~past].max(-1) > 1e-4).all()  # every row reads every row before the end


def test_padding_further_changes_nothing(params):
  ids = ORACLE["short_ids"]
  more = np.pad(ids, ((0, 0), (0, 16)))
  out = encode(EXACT, params, more)
  assert distance(out[:, : ids.shape[1]], ORACLE["short"]) <= 1e-5 and not out[:, ids.shape[1] :].any()


def test_a_padding_token_inside_a_prompt_is_read(params):
  ids = np.array([[5, 0, 9, 1, 0, 0]], np.int32)
  want = np.asarray(forward(EXACT, params, ids, np.array([4], np.int32)))
  assert (encode(EXACT, params, ids) == want).all() and want[0, 1].any()


def test_full_size_has_exactly_its_parameters():
  cfg = UMT5Config()
  keys = umt5_keys.shapes(cfg)
  count = sum(math.prod(shape) for shape in keys.values())
  assert len(keys) == 24 * 10 + 2
  assert count == 256384 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64) + 4096 == 5_680_910_336
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_umt5(cfg))) == count
  ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  out = jax.eval_shape(UMT5Encoder("").encode, abstract_umt5(cfg), ids)
  assert out.shape == (2, 512, 4096) and out.dtype == jnp.bfloat16


def test_fresh_weights_have_the_shapes_of_the_key_table(params):
  fresh = init_umt5(EXACT, 1)
  like = lambda tree: jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)
  assert like(fresh) == like(params) == like(abstract_umt5(EXACT))
  assert len({np.asarray(q).tobytes() for q in fresh["layers"]["q"]}) == 3  # every layer its own


def test_bad_sizes_are_refused():
  for bad in (dict(dtype="float16"), dict(param_dtype="int8"), dict(buckets=6), dict(buckets=0), dict(max_distance=8)):
    with pytest.raises(ValueError, match=next(iter(bad))):
      UMT5Config(**bad)


# Keys.


def test_every_key_lands_where_it_belongs(params):
  arrays = official()
  layers = params["layers"]
  for i in range(3):
    assert (layers["q"][i] == arrays[f"blocks.{i}.attn.q.weight"].T).all()
    assert (layers["fc2"][i] == arrays[f"blocks.{i}.ffn.fc2.weight"].T).all()
    assert (layers["position"][i] == arrays[f"blocks.{i}.pos_embedding.embedding.weight"]).all()
  found = sorted(x.tobytes() for stack in layers.values() for x in np.swapaxes(stack, 1, -1))
  turned = lambda x: np.ascontiguousarray(np.swapaxes(x, 0, -1)).tobytes()
  linear = lambda name: not name.endswith(("norm1.weight", "norm2.weight", "pos_embedding.embedding.weight"))
  want = sorted(x.tobytes() if linear(name) else turned(x) for name, x in arrays.items() if name.startswith("blocks."))
  assert found == want  # each once, none left out


def test_tensors_in_a_file_are_read_once_each(params):
  reads = []

  @dataclasses.dataclass
  class Stored:
    name: str
    value: np.ndarray

    @property
    def shape(self):
      return self.value.shape

    @property
    def dtype(self):
      return self.value.dtype

    def read(self):
      reads.append(self.name)
      return self.value

  got = keys.read(umt5_keys.arrays(EXACT, {name: Stored(name, x) for name, x in official().items()}, "t5.pth"))
  assert sorted(reads) == sorted(official())
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, params))


def transformers_arrays():
  """What UMT5EncoderModel.state_dict() holds: names and shapes as transformers tells, values by the official name."""
  rows = zip(*(ORACLE[key].tolist() for key in ("names", "official", "shapes")), strict=True)
  return {name: weight(own, [int(n) for n in shape.split("x")]).astype(np.float32) for name, own, shape in rows}


def test_transformers_names(params):
  arrays = transformers_arrays()
  assert {"shared.weight", "encoder.embed_tokens.weight"} <= set(arrays)
  for dropped in (None, "shared.weight", "encoder.embed_tokens.weight"):
    given = {name: x for name, x in arrays.items() if name != dropped}
    named = umt5_keys.official_from_transformers(given, "t5")
    assert {name: x.tobytes() for name, x in named.items()} == {name: x.tobytes() for name, x in official().items()}
  got = from_official(EXACT, named)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, params))


def test_wrong_keys_are_named_and_counted():
  def attempt(change, fn=from_official, arrays=None):
    arrays = arrays or official()
    change(arrays)
    return lambda: fn(EXACT, arrays, "t5.pth")

  def without_ffn(arrays):
    for name in [n for n in arrays if ".ffn." in n]:
      del arrays[name]

  refused(attempt(lambda a: a.pop("norm.weight")), "t5.pth", "lacks 1 tensor: norm.weight")
  gates = "blocks.0.ffn.gate.0.weight, blocks.1.ffn.gate.0.weight, "
  refused(attempt(without_ffn), f"lacks 9 tensors: {gates}", " and 6 more")
  refused(attempt(lambda a: a.update(lm_head=a["norm.weight"])), "holds unexpected 1 tensor: lm_head")
  refused(
    attempt(lambda a: a.update({"blocks.3.norm1.weight": a["norm.weight"]})), "unexpected 1 tensor: blocks.3.norm1"
  )
  turned = lambda a: a.update({"blocks.1.ffn.fc1.weight": a["blocks.1.ffn.fc1.weight"].T})
  refused(attempt(turned), "holds wrongly shaped 1 tensor: blocks.1.ffn.fc1.weight [32, 64] (want [64, 32])")

  def renamed(cfg, arrays, source):
    return from_official(cfg, umt5_keys.official_from_transformers(arrays, source), source)

  theirs = lambda change: attempt(change, renamed, transformers_arrays())
  name = "encoder.block.2.layer.1.DenseReluDense.wi_0.weight"
  refused(theirs(lambda a: a.pop(name)), "t5.pth", "lacks 1 tensor: blocks.2.ffn.gate.0.weight")
  neither = lambda a: (a.pop("shared.weight"), a.pop("encoder.embed_tokens.weight"))
  refused(theirs(neither), "lacks 1 tensor: token_embedding.weight")
  refused(theirs(lambda a: a.update({"encoder.embed_tokens.weight": a["shared.weight"] + 1})), "differ")


# Text.


def encoder(length=24, cfg=None, tokenizer=TOKENIZER):
  return UMT5Encoder(tokenizer, length, cfg or dataclasses.replace(EXACT, vocab=512))


@pytest.mark.parametrize("row", TOKENS, ids=range(len(TOKENS)))
def test_prompts_are_cleaned_as_written_by_hand(row):
  assert clean_prompt(row["prompt"]) == row["cleaned"]


def test_tokens_are_those_of_transformers():
  ids = encoder().tokens([row["prompt"] for row in TOKENS])
  assert ids.dtype == np.int32
  assert ids.tolist() == [row["ids"] for row in TOKENS]
  assert sum(row["length"] == 24 for row in TOKENS) >= 3  # some are cut


def test_cut_and_padded_to_any_length():
  prompt = TOKENS[12]["prompt"]
  whole = encoder(512).tokens([prompt])[0]
  n = int((whole != 0).sum())
  assert 24 < n < 512 and whole[n - 1] == 1 and not whole[n:].any()
  for length in (1, 2, n - 1, n, n + 1):
    row = encoder(length).tokens([prompt])[0]
    kept = min(length, n)
    assert row[: kept - 1].tolist() == whole[: kept - 1].tolist()
    assert row[kept - 1] == 1 and not row[kept:].any()


def test_padding_and_truncation_of_the_file_are_overruled(tmp_path):
  own = json.loads(pathlib.Path(TOKENIZER).read_text())
  own["truncation"] = dict(direction="Right", max_length=7, strategy="LongestFirst", stride=0)
  own["padding"] = dict(
    strategy=dict(Fixed=30), direction="Left", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="<pad>"
  )
  (tmp_path / "t.json").write_text(json.dumps(own))
  ids = encoder(tokenizer=str(tmp_path / "t.json")).tokens([row["prompt"] for row in TOKENS])
  assert ids.tolist() == [row["ids"] for row in TOKENS]


def test_empty_prompt_is_one_row(params):
  small = encoder()
  table = np.resize(params["embedding"], (512, 32))
  out = np.asarray(small.encode({**params, "embedding": table}, small.tokens([""])))
  assert out.shape == (1, 24, 32) == (1, small.length, small.dim)
  assert out[0, 0].any() and not out[0, 1:].any()


@pytest.mark.parametrize("bad", ["a \udcff cat", b"a cat", None])
def test_what_is_no_text_is_refused(bad):
  refused(lambda: encoder().tokens(["fine", bad], "--prompt_file"), "--prompt_file", repr(bad), "not valid text")


def test_bad_tokenizer_files_are_refused(tmp_path):
  def attempt(content=None, **kw):
    file = tmp_path / "tokenizer.json"
    if content is not None:
      file.write_bytes(content)
    return lambda: encoder(tokenizer=str(file), **kw).tokens(["a"])

  whole = pathlib.Path(TOKENIZER).read_bytes()
  refused(attempt(), "tokenizer.json", "No such file")
  refused(lambda: encoder(tokenizer=str(tmp_path)).tokens(["a"]), str(tmp_path), "cannot be read")
  refused(lambda: encoder(tokenizer=str(tmp_path / "none")).identity("w"), "No such file")
  for broken in (b"", b"{}", b"\xff\xfe", whole[: len(whole) // 2], b"[1,\n2]"):
    refused(attempt(broken), "tokenizer.json", "not a tokenizer.json")
  no_end = json.dumps({**json.loads(whole), "post_processor": None}).encode()
  refused(attempt(no_end), "tokenizer.json", "end-of-sequence")
  refused(attempt(whole, cfg=EXACT), "tokenizer.json", "vocabulary ends at 199")
  attempt(whole)()  # and the file itself is fine


# The cache.


class Encode:
  """A stand-in for an encoder: rows that depend on the prompt; remembers what it was asked."""

  def __init__(self, dtype="bfloat16", fail_at=None):
    self.dtype, self.fail_at, self.asked = dtype, fail_at, []

  def __call__(self, prompts):
    self.asked.append(list(prompts))
    if self.fail_at in prompts:
      raise RuntimeError("stop")
    out = np.zeros((len(prompts), 5, 4), jnp.dtype(self.dtype))
    for i, prompt in enumerate(prompts):
      out[i, :3] = np.random.default_rng(len(prompt)).normal(size=(3, 4))
    return out


def cache(folder, identity="e", dtype="bfloat16"):
  return TextCache(folder, identity, (5, 4), dtype)


def bits(x):
  return x.tobytes(), x.dtype, x.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cache_gives_back_the_same_bits(tmp_path, dtype):
  c = cache(tmp_path / "a/b", dtype=dtype)
  first = Encode(dtype)
  prompts = ["a cat", "rain", "a  cat ", ""]
  out = c.embed(prompts, first, batch=2)
  assert first.asked == [["a cat", "rain"], [""]]  # once for what is one prompt after cleaning
  assert bits(out[:2]) == bits(Encode(dtype)(prompts[:2])) and bits(out[2]) == bits(out[0])
  again = Encode(dtype)
  assert bits(cache(tmp_path / "a/b", dtype=dtype).embed(prompts, again)) == bits(out) and not again.asked
  assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == sorted({c.path(p).name for p in prompts})
  assert np.load(c.path("rain")).shape == (3, 4)  # without the zero rows, and readable by anyone
  assert cache(tmp_path).embed([], again).shape == (0, 5, 4)


def test_cache_keys_tell_encoders_and_prompts_apart(tmp_path):
  c = cache(tmp_path)
  assert c.path("tea &amp; rain") == c.path(" tea  & rain")
  paths = [c.path("a cat"), c.path("A cat"), cache(tmp_path, "f").path("a cat"), cache(tmp_path, "ea").path("cat")]
  assert len(set(paths)) == 4
  small = encoder()
  others = [encoder(25), encoder(cfg=dataclasses.replace(HALF, vocab=512)), encoder(tokenizer=str(tmp_path / "t.json"))]
  (tmp_path / "t.json").write_bytes(pathlib.Path(TOKENIZER).read_bytes() + b"\n")
  assert len({small.identity("w"), small.identity("v"), *(x.identity("w") for x in others)}) == 5
  refused(lambda: c.path("\ud800", "--prompt_file"), "--prompt_file")


def damage_flip(raw):
  return raw[:-10] + bytes([raw[-10] ^ 1]) + raw[-9:]


@pytest.mark.parametrize(
  "damage", [damage_flip, lambda raw: raw[:-9], lambda raw: b"", lambda raw: b"\0" * 4, lambda raw: raw + b"x"]
)
def test_damaged_files_are_made_again(tmp_path, damage):
  c, first, again = cache(tmp_path), Encode(), Encode()
  out = c.embed(["a cat", "rain"], first)
  whole = c.path("rain").read_bytes()
  assert damage(whole) != whole
  c.path("rain").write_bytes(damage(whole))
  assert bits(c.embed(["a cat", "rain"], again)) == bits(out) and again.asked == [["rain"]]
  assert c.path("rain").read_bytes() == whole


def test_files_of_another_shape_or_dtype_are_made_again(tmp_path):
  TextCache(tmp_path, "e", (5, 2)).embed(["a cat"], lambda p: np.ones((1, 5, 2), jnp.bfloat16))
  again = Encode()
  cache(tmp_path).embed(["a cat"], again)
  assert again.asked
  again = Encode("float32")
  assert cache(tmp_path, dtype="float32").embed(["a cat"], again).dtype == np.float32 and again.asked
  again = Encode()
  tall = TextCache(tmp_path, "e", (2, 4), "float32")  # 3 rows are stored
  with pytest.raises(ValueError, match=r"gave bfloat16 \[1, 5, 4\]; this cache holds float32 \[1, 2, 4\]"):
    tall.embed(["a cat"], again)


def test_an_encoder_that_fails_leaves_what_was_done_and_no_more(tmp_path):
  c = cache(tmp_path)
  with pytest.raises(RuntimeError, match="stop"):
    c.embed(["a cat", "rain", "tea"], Encode(fail_at="rain"))
  assert [p.name for p in tmp_path.iterdir()] == [c.path("a cat").name]


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
  (tmp_path / "file").write_text("")
  work = Encode()
  refused(lambda: cache(tmp_path / "file").embed(["a"], work), "the text cache", "file")
  assert not work.asked


def test_cached_embeddings_of_the_encoder_itself(tmp_path, params):
  small = encoder()
  weights = {**params, "embedding": np.resize(params["embedding"], (512, 32))}
  run = jax.jit(small.encode)
  c = TextCache(tmp_path, small.identity("seeded"), (small.length, small.dim), small.cfg.dtype)
  prompts = [row["prompt"] for row in TOKENS[2:5]]
  out = c.embed(prompts, lambda some: run(weights, small.tokens(some)))
  want = np.concatenate([np.asarray(run(weights, small.tokens([p]))) for p in prompts])
  assert bits(out) == bits(want)
  assert bits(c.embed(prompts, None)) == bits(want)
