"""Whole folders through `sfjax.convert`: Wan2.1's own layout and diffusers', with DiT, text encoder, VAE and tokenizer."""

import json

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sfjax import convert, keys, umt5_keys, wan, wan_keys, wan_vae_keys
from sfjax.config import to_dataclass
from sfjax.tensors import of_arrays
from sfjax.umt5 import UMT5Config
from sfjax.wan_vae import WanVAEConfig
from tests.fixtures.seeded import weight
from tests.wan import test_dit, test_umt5
from tests.wan.test_dit import TINY, torch_file

TEXT = UMT5Config(vocab=200, dim=32, heads=4, head_dim=8, ffn_dim=64, layers=3, dtype="bfloat16", param_dtype="float32")
VAE = WanVAEConfig(dim=8)


def vae_weights():
  return {name: weight(name, w.shape) for name, w in wan_vae_keys.table(VAE).items()}


def official_folder(path):
  save_file(test_dit.official("tiny"), path / "diffusion_pytorch_model.safetensors")
  (path / "config.json").write_text(json.dumps({"num_heads": TINY.heads}))
  torch_file(test_umt5.official(), path / "models_t5_umt5-xxl-enc-bf16.pth")
  torch_file(vae_weights(), path / "Wan2.1_VAE.pth")
  (path / "google" / "umt5-xxl").mkdir(parents=True)
  (path / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")


def diffusers_folder(path):
  test_dit.as_diffusers(test_dit.official("tiny"), path / "x")
  (path / "transformer" / "config.json").write_text(json.dumps({"num_attention_heads": TINY.heads}))
  for part, arrays in (("text_encoder", test_umt5.transformers_arrays()), ("vae", vae_weights())):
    (path / part).mkdir()
    save_file(arrays, path / part / "model.safetensors")
  (path / "tokenizer").mkdir()
  (path / "tokenizer" / "tokenizer.json").write_text("{}")


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("make", [official_folder, diffusers_folder])
def test_a_folder_with_all_parts(make, tmp_path):
  source, target = tmp_path / "source", tmp_path / "model"
  source.mkdir()
  make(source)
  convert.main([str(source), str(target)])
  dit = wan.load_dit(target, TINY)
  same(dit, keys.read(wan_keys.arrays(TINY, of_arrays(test_dit.official("tiny")), "here")))

  assert to_dataclass(UMT5Config, json.loads((target / "text.json").read_text())).layers == TEXT.layers
  text = wan.load_text(target, TEXT)
  same(text, keys.read(umt5_keys.arrays(TEXT, of_arrays(test_umt5.official()), "here")))

  assert to_dataclass(WanVAEConfig, json.loads((target / "vae.json").read_text())) == VAE
  vae = wan_vae_keys.to_official(VAE, wan.load_vae(target, VAE))
  same(vae, vae_weights())
  assert (target / "tokenizer.json").read_text() == "{}"


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch, capsys):
  (tmp_path / "source").mkdir()
  official_folder(tmp_path / "source")

  def download(name, allow_patterns):
    if name != "owner/name":
      raise ConnectionError("no network")
    assert {"*.safetensors", "*.pth", "*.json"} <= set(allow_patterns)
    return tmp_path / "source"

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  convert.main(["owner/name", str(tmp_path / "model")])
  assert {p.name for p in (tmp_path / "model").iterdir()} >= {"dit", "text", "vae", "tokenizer.json", "config.json"}
  capsys.readouterr()
  with pytest.raises(SystemExit):
    convert.main(["owner/other", str(tmp_path / "model")])
  assert "owner/other is no file or folder here, and cannot be downloaded (ConnectionError)" in capsys.readouterr().err


def test_what_holds_no_weights_is_refused(tmp_path, capsys):
  save_file({"something": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
  (tmp_path / "empty").mkdir()
  for name, line in (
    ("x.safetensors", "no Wan2.1 DiT"),
    ("none", "no such file"),
    ("empty", "holds no .safetensors, .pt or"),
  ):
    with pytest.raises(SystemExit) as e:
      convert.main([str(tmp_path / name), str(tmp_path / "model")])
    assert e.value.code == 2 and line in capsys.readouterr().err


@pytest.mark.parametrize(
  ("change", "line"),
  [
    ({"patch_embedding.weight": 64}, "no Wan2.1 DiT; patch_embedding.weight has shape [64], want one of length 5"),
    ({"text_embedding.0.weight": 64}, "no Wan2.1 DiT; text_embedding.0.weight has shape [64], want one of length 2"),
    ({"patch_embedding.weight": None}, "no Wan2.1 DiT; no patch_embedding.weight"),
    ({"token_embedding.weight": 64}, "no UMT5 encoder; token_embedding.weight has shape [64], want one of length 2"),
    ({"decoder.conv1.bias": 64}, "no Wan2.1 VAE; no encoder.conv1.bias"),
    ([1], "config.json: want the model's config, an object whose num_heads, if there, is a number"),
    ("{", "config.json: want the model's config"),
    ({"num_heads": "two"}, "config.json: want the model's config"),
    ({"num_heads": 5}, "heads: 5"),
  ],
)
def test_what_does_not_fit_is_named(change, line, tmp_path, capsys):
  arrays = test_dit.official("tiny")
  if "config" in line or "heads" in line:
    (tmp_path / "config.json").write_text(change if change == "{" else json.dumps(change))
    change = {}
  arrays |= {name: np.zeros(n, np.float32) for name, n in change.items() if n}
  save_file({n: x for n, x in arrays.items() if change.get(n, 1)}, tmp_path / "x.safetensors")
  with pytest.raises(SystemExit) as e:
    convert.main([str(tmp_path / "x.safetensors"), str(tmp_path / "model")])
  error = capsys.readouterr().err
  assert e.value.code == 2 and error.count("\n") == 1 and line in error and not (tmp_path / "model").exists()
