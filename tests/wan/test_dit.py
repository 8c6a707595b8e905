"""The DiT against diffusers' implementation, weights passing through the real file formats, and what converting refuses."""

import dataclasses
import json
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from sfjax import convert, wan, wan_keys
from sfjax.checkpoint import load_config
from sfjax.config import Config, to_dataclass
from sfjax.errors import UserError
from sfjax.model import DiT, ModelConfig, init_dit
from sfjax.tensors import open_tensors
from tests.fixtures.seeded import normal, weight

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
EXPECTED = np.load(FIXTURES / "wan_dit.npz")
TINY = ModelConfig.wan_1_3b(
  dim=64, layers=3, heads=2, ffn_dim=96, text_dim=24, text_len=16, freq_dim=32, latent_size=(8, 12), tile=(3, 2, 2),
  dtype="float32",
)  # fmt: skip
FULL_BLOCK = ModelConfig.wan_1_3b(
  layers=1, text_dim=64, text_len=16, latent_size=(4, 4), tile=(3, 2, 2), dtype="float32"
)
CASES = {"tiny": (TINY, 7, (937.5, 3.25)), "full_block": (FULL_BLOCK, 5, (625.0,))}


def official(case: str, dtype=np.float32) -> dict[str, np.ndarray]:
  """A case's weights by official name."""
  cfg = CASES[case][0]
  table = [(name, rule.shape) for rule in wan_keys.rules(cfg).values() for name in rule.names(cfg.layers)]
  return {name: weight(f"{case} {name}", shape).astype(dtype) for name, shape in table}


def run(case: str, cfg: ModelConfig, params: dict) -> np.ndarray:
  """The whole clip as one chunk, every token seeing every other: [B,C,F,h,w] as the oracle gives it."""
  _, rows, times = CASES[case]
  x = normal(f"{case} x", (len(times), 16, 3, *cfg.latent_size)).transpose(0, 2, 3, 4, 1)[:, None]
  text = np.pad(normal(f"{case} text", (len(times), rows, cfg.text_dim)), ((0, 0), (0, cfg.text_len - rows), (0, 0)))
  graph, like = jax.eval_shape(lambda: init_dit(cfg))
  nnx.replace_by_pure_dict(like, params)
  model = nnx.merge(graph, like)

  def attend(block, carry, extra, h, turn):
    q, k, v = (a[:, 0] for a in block.self_attn.turned(h, turn))
    return block.self_attn.out(jax.nn.dot_product_attention(q, k, v)[:, None]), carry, None

  def forward(model: DiT):
    t = jnp.broadcast_to(jnp.asarray(times)[:, None, None], (len(times), 1, 3))
    return model(jnp.asarray(x), t, jnp.zeros(1), model.text_kv(jnp.asarray(text)), attend)[0]

  with jax.default_matmul_precision("highest"):
    return np.asarray(forward(model))[:, 0].transpose(0, 4, 1, 2, 3)


def apart(a, b) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def converted(tmp_path, case, *flags, write=None, name="w.safetensors", dtype=np.float32):
  """Runs the command on a case's weights, written by `write`, and loads what it made."""
  source = tmp_path / name
  (write or save_file)(official(case, dtype), source)
  (source.parent / "config.json").write_text(json.dumps({"num_heads": CASES[case][0].heads}))
  convert.main([str(source), str(tmp_path / "out"), *flags])
  return wan.load_dit(tmp_path / "out", CASES[case][0])


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case, tmp_path):
  params = converted(tmp_path, case)
  cfg = CASES[case][0]
  out = run(case, cfg, params)
  assert apart(out, EXPECTED[case]) <= 1e-5
  assert apart(out, EXPECTED[f"{case} stock"]) <= 1e-4  # its own rounding of angles
  half = run(case, dataclasses.replace(cfg, dtype="bfloat16"), params)
  assert apart(half, EXPECTED[case]) <= EXPECTED[f"{case} bfloat16 error"]  # Self-Forcing's own
  assert EXPECTED[f"{case} float32 error"] <= 1e-6  # the two oracles agree


def test_config_is_a_model_of_these_sizes(tmp_path):
  converted(tmp_path, "tiny")
  config = to_dataclass(Config, load_config(tmp_path / "out"))
  for name in ("dim", "layers", "heads", "ffn_dim", "text_dim", "freq_dim"):
    assert getattr(config.model, name) == getattr(TINY, name)


def test_parameter_counts():
  for cfg, count in ((ModelConfig.wan_1_3b(), 1_418_996_800), (ModelConfig.wan_14b(), 14_288_491_584)):
    assert sum(np.prod(r.shape) * len(r.names(cfg.layers)) for r in wan_keys.rules(cfg).values()) == count


def diffusers_name(name: str) -> str:
  """The other way, written down again: part by part."""
  if name == "head.modulation":
    return "scale_shift_table"
  if name.endswith(".modulation"):
    return name.replace(".modulation", ".scale_shift_table")
  for attention, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for x in "qkv":
      name = name.replace(f"{attention}.{x}.", f"{theirs}.to_{x}.")
    name = name.replace(f"{attention}.o.", f"{theirs}.to_out.0.").replace(attention, theirs)
  for official, theirs in (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    (".norm3.", ".norm2."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
  ):
    name = name.replace(official, theirs)
  return name


def as_diffusers(arrays, path):
  """Two files and an index, with diffusers' names."""
  folder = path.parent / "transformer"
  folder.mkdir()
  renamed = {diffusers_name(k): v for k, v in arrays.items()}
  names, half = list(renamed), len(renamed) // 2
  where = {}
  for i, part in enumerate((names[:half], names[half:])):
    file = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
    save_file({n: renamed[n] for n in part}, folder / file)
    where |= dict.fromkeys(part, file)
  (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def torch_file(tree, path):
  """A file as torch.save writes it, made without torch: a pickle with tensors, their bytes beside it."""
  storages = []
  kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}

  def text(x):
    raw = x.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw

  def number(n):
    return b"J" + struct.pack("<i", n)

  def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"

  def dump(node):
    if isinstance(node, dict):
      return b"}(" + b"".join(text(k) + dump(v) for k, v in node.items()) + b"u"
    storages.append(node)
    stride = [s // node.itemsize for s in node.strides]
    storage = b"(" + text("storage") + f"ctorch\n{kinds[node.dtype.name]}\n".encode()
    storage += text(str(len(storages) - 1)) + text("cpu") + number(node.size) + b"tQ"
    ordered = b"ccollections\nOrderedDict\n)R"
    body = storage + number(0) + numbers(node.shape) + numbers(stride) + b"\x89" + ordered
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR"

  data = b"\x80\x02" + dump(tree) + b"."
  with zipfile.ZipFile(path, "w") as z:
    z.writestr("archive/data.pkl", data)
    for i, x in enumerate(storages):
      z.writestr(f"archive/data/{i}", np.ascontiguousarray(x).tobytes())


def as_self_forcing(arrays, path):
  """generator and generator_ema side by side, wrapped as a trainer's EMA is; the former holds other numbers."""
  wrapped = {f"model._fsdp_wrapped_module.{k}": v for k, v in arrays.items()}
  torch_file({"generator": {k: v + 1 for k, v in wrapped.items()}, "generator_ema": wrapped, "step": {}}, path)


@pytest.mark.parametrize("write, name", [(as_diffusers, "d"), (as_self_forcing, "m.pt"), (torch_file, "m.pth")])
def test_other_formats_give_the_same_bits(write, name, tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  plain = converted(tmp_path / "a", "tiny")
  source = tmp_path / "b" / name
  write(official("tiny"), source)
  where = source.parent if write is as_diffusers else source
  folder = source.parent / "transformer" if write is as_diffusers else source.parent
  (folder / "config.json").write_text(json.dumps({"num_attention_heads": TINY.heads}))
  convert.main([str(where), str(tmp_path / "b" / "out")])
  jax.tree.map(np.testing.assert_array_equal, wan.load_dit(tmp_path / "b" / "out", TINY), plain)


def test_a_group_can_be_chosen(tmp_path):
  ema = converted(tmp_path, "tiny", "--weights", "generator_ema", write=as_self_forcing, name="m.pt")
  convert.main([str(tmp_path / "m.pt"), str(tmp_path / "out"), "--weights", "generator"])
  other = wan.load_dit(tmp_path / "out", TINY)
  np.testing.assert_allclose(other["head"]["bias"], ema["head"]["bias"] + 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_back_to_official_names_bit_for_bit(dtype, tmp_path, monkeypatch):
  monkeypatch.setattr(convert, "SHARD", 100_000)  # several files
  converted(tmp_path, "tiny", dtype=dtype)
  convert.main([str(tmp_path / "out"), str(tmp_path / "back"), "--to", "safetensors"])
  files = sorted((tmp_path / "back").glob("*.safetensors"))
  assert len(files) > 1
  found = {k: v for file in files for k, v in load_file(file).items()}
  want = official("tiny", dtype)
  assert found.keys() == want.keys() == open_tensors(tmp_path / "back").keys()
  for name, x in want.items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name].view(np.uint8), x.view(np.uint8))


def test_restores_onto_a_mesh(tmp_path):
  plain = converted(tmp_path, "tiny")
  mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), plain)
  placed = wan.load_dit(tmp_path / "out", TINY, shardings)
  assert jax.tree.leaves(placed)[0].sharding == NamedSharding(mesh, PartitionSpec())
  jax.tree.map(np.testing.assert_array_equal, placed, plain)


def edited(change):
  """Writes a case's tensors after `change` has been at them."""

  def write(arrays, path):
    change(arrays)
    save_file(arrays, path)

  return write


def truncated(arrays, path):
  save_file(arrays, path)
  path.write_bytes(path.read_bytes()[:-1000])


def truncated_zip(arrays, path):
  torch_file(arrays, path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put(name, shape):
  return edited(lambda a: a.update({name: np.zeros(shape, np.float32)}))


@pytest.mark.parametrize(
  "write, name, line",
  [
    (edited(lambda a: a.pop("blocks.1.ffn.0.bias")), "w.safetensors", "lacks 1 tensor: blocks.1.ffn.0.bias"),
    (put("blocks.0.extra", (1,)), "w.safetensors", "holds unexpected 1 tensor: blocks.0.extra"),
    (put("blocks.2.modulation", (1, 6, 63)), "w.safetensors", r"wrongly shaped 1 tensor: blocks.2.modulation \[1, 6, 63\]"),
    (put("blocks.0.attn1.to_q.weight", (64, 64)), "w.safetensors", "two tensors for blocks.0.self_attn.q.weight"),
    (put("vace_blocks.0.x", (1,)), "w.safetensors", "VACE weights"),
    (put("img_emb.proj.0.bias", (1,)), "w.safetensors", "image-to-video weights"),
    (put("patch_embedding.weight", (64, 48, 1, 2, 2)), "w.safetensors", "48 channels .Wan2.2 5B."),
    (edited(lambda a: a.pop("patch_embedding.weight")), "w.safetensors", "no patch_embedding.weight"),
    (edited(lambda a: [a.pop(k) for k in list(a) if "norm" in k]), "w.safetensors", "lacks 18 tensors: .* and 15 more"),
    (truncated, "w.safetensors", "damaged or truncated"),
    (truncated_zip, "w.pt", "damaged or truncated"),
    (lambda a, path: path.write_text("x"), "w.bin", "want a .safetensors, .pt or .pth file"),
  ],
)  # fmt: skip
def test_bad_files_end_in_one_line(write, name, line, tmp_path, capsys):
  with pytest.raises(SystemExit) as e:
    converted(tmp_path, "tiny", write=write, name=name)
  assert e.value.code == 2
  text = capsys.readouterr().err
  assert text.count("\n") == 1
  assert re.search(line, text), text
  assert not (tmp_path / "out" / "config.json").exists()


def test_a_pickle_is_not_run(tmp_path):
  mark = tmp_path / "written"

  class Evil:
    def __reduce__(self):
      return pathlib.Path.touch, (mark,)

  with zipfile.ZipFile(tmp_path / "m.pt", "w") as z:
    z.writestr("archive/data.pkl", pickle.dumps({"model": Evil()}))
  with pytest.raises(UserError, match="its pickle asks for pathlib"):
    open_tensors(tmp_path / "m.pt")
  assert not mark.exists()


def test_reads_what_torch_wrote():
  """tests/fixtures/make_torch_file.py saved it: nested, in three dtypes, a transposed view, a parameter, an empty tensor."""
  found = open_tensors(FIXTURES / "torch_saved.pt")
  assert set(found) == {"float32", "inner/bfloat16", "inner/float16", "turned", "parameter", "empty"}
  for name, x in found.items():
    want = normal(name.rsplit("/")[-1], (4, 3))
    want = want.T if name == "turned" else want[:0] if name == "empty" else want
    assert x.shape == want.shape
    np.testing.assert_array_equal(x.read(), want.astype(x.dtype))


def test_absent_sources(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    open_tensors(tmp_path / "nothing.safetensors")
  with pytest.raises(UserError, match="holds no .safetensors"):
    open_tensors(tmp_path)
  (tmp_path / "a.safetensors.index.json").write_text('{"weight_map": {"lost": "b.safetensors"}}')
  save_file({"kept": np.zeros(1, np.float32)}, tmp_path / "b.safetensors")
  with pytest.raises(UserError, match="lists 1 tensors that no file holds, such as lost"):
    open_tensors(tmp_path)


def test_memory_stays_small(tmp_path):
  """A file of 240 MB passes in less than that: one tensor at a time."""
  cfg = ModelConfig.wan_1_3b(dim=768, layers=6, heads=6, ffn_dim=3072, text_dim=64, freq_dim=64)
  names = [(n, r.shape) for r in wan_keys.rules(cfg).values() for n in r.names(cfg.layers)]
  save_file({n: np.full(s, 0.5, np.float32) for n, s in names}, tmp_path / "w.safetensors")
  size = (tmp_path / "w.safetensors").stat().st_size
  code = (
    "import resource, sys; from sfjax import convert; low = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
    "convert.main(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - low)"
  )
  args = [sys.executable, "-c", code, str(tmp_path / "w.safetensors"), str(tmp_path / "out")]
  out = subprocess.run(args, capture_output=True, text=True, check=True).stdout
  assert size > 150e6 and int(out.split()[-1]) * 1024 < 0.6 * size, (out, size)
