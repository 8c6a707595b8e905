"""From converted Wan2.1 weights and a prompt to a video: the sampler on a tiny model of the same parts."""

import dataclasses
import json
import pathlib
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import sample
from sfjax import convert, ledger, sample_command, wan, wan_keys, wan_vae_keys
from sfjax.model import ModelConfig
from sfjax.sampling import Sampler
from sfjax.tiny_vae import TinyVAE, from_official
from sfjax.umt5 import UMT5Config
from sfjax.wan_vae import WanVAE, WanVAEConfig, to_uint8
from tests.fixtures.seeded import weight
from tests.wan import test_umt5

DIT = ModelConfig.wan_1_3b(dim=64, layers=2, heads=2, ffn_dim=96, text_dim=32, freq_dim=32)
TEXT = UMT5Config(vocab=512, dim=32, heads=4, head_dim=8, ffn_dim=64, layers=2)
VAE = WanVAEConfig(dim=8)
FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """What the command makes of the three files, then the sizes of a small video put into its config."""
  source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target") / "model"
  dit = [(n, r.shape) for r in wan_keys.rules(DIT).values() for n in r.names(DIT.layers)]
  save_file({n: weight(n, s) for n, s in dit}, source / "dit.safetensors")
  (source / "config.json").write_text(json.dumps({"num_heads": DIT.heads}))
  for part, arrays in (
    ("text_encoder", test_umt5.official(TEXT)),
    ("vae", {n: weight(n, w.shape) for n, w in wan_vae_keys.table(VAE).items()}),
  ):
    (source / part).mkdir()
    save_file(arrays, source / part / "model.safetensors")
  (source / "tokenizer").mkdir()
  shutil.copyfile(test_umt5.TOKENIZER, source / "tokenizer" / "tokenizer.json")
  convert.main([str(source), str(target)])
  config = json.loads((target / "config.json").read_text())
  config["model"] |= dict(latent_size=[8, 12], tile=[3, 2, 2], text_len=24)
  config["memory"] |= dict(window=2, persistent=4, top_k=0.5)
  (target / "config.json").write_text(json.dumps(config))
  return target


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_the_command_makes_a_video(folder, tmp_path):
  flags = ["--checkpoint", str(folder), "--prompt", "a cat &amp; a dog", "--seconds", "1.3", "--out", str(tmp_path)]
  sample.main(flags)
  record = json.loads((tmp_path / "run.json").read_text())
  assert record["videos"][0]["frames"] == 21 and (tmp_path / "00.mp4").stat().st_size > 0
  assert record["kv_bytes"]["predicted"]["kv"] == record["kv_bytes"]["measured"]
  assert_told(record["device_bytes"])


def assert_told(told: dict, tiny: bool = False):
  """Predicted and measured bytes agree in every part that both know."""
  predicted, measured = told["predicted"], told["measured"]
  same = [name for name in measured if name != "total"]
  assert {name: predicted[name] for name in same} == {name: measured[name] for name in same}
  assert predicted["total"] == measured["total"] + predicted["in_flight"]
  assert {"dit", "vae", "persistent", "window", "codec_state"} <= {name for name in same if measured[name]}
  assert ("tiny_decoder" in same) == tiny and "text" not in same
  assert all(n > 0 for n in told["workspace"].values()) and {"chunk", "decode first"} <= told["workspace"].keys()


@pytest.mark.parametrize("attention", ["sparse", "window", "dense"])
def test_predicted_bytes_are_the_arrays(folder, attention, capsys):
  sampler = Sampler(folder, attention)
  predicted = ledger.predict(sampler.config, sampler.parts.around)
  held = (sampler.parts.dit, sampler.parts.others, sampler.start(["a cat"], 3), sampler.parts.start(1))
  assert predicted["total"] - predicted["in_flight"] == sum(np.asarray(x).nbytes for x in jax.tree.leaves(held))
  latents, pixels = 3 * 8 * 12 * 16 * 4, 12 * 64 * 96 * 3
  assert predicted["in_flight"] == 2 * (2 * latents + pixels)
  ledger.main(["--checkpoint", str(folder), "--attention", attention, "--config.model.dtype=float32"])
  sampling, embedding = capsys.readouterr().out.split("new prompts")
  assert f"| {predicted['total']:,} |" in sampling and "text encoder" not in sampling
  text = sum(np.asarray(x).nbytes for x in jax.tree.leaves(wan.load_text(folder, sampler.parts.around.text)))
  assert f"| {text:,} |" in embedding


def spied(sampler: Sampler, spy) -> Sampler:
  """The sampler, but that spy(latents, first) is called before a chunk is decoded."""
  decode = sampler.parts.decode
  sampler.parts = dataclasses.replace(sampler.parts, decode=lambda s, x, first: (spy(x, first), decode(s, x, first))[1])
  return sampler


def test_streamed_pixels_are_those_of_the_whole_clip(folder):
  seen = []
  sampler = spied(Sampler(folder), lambda latents, first: seen.append(latents))
  frames = list(sampler.stream(sampler.start(["a cat"], 3), 33, 3, [0]))
  assert [f.shape[1] for f in frames] == [9, 12, 12]
  vae = WanVAE(VAE)
  whole = to_uint8(vae.decode(wan.load_vae(folder, VAE), jnp.concatenate(seen, 1)))
  apart = np.abs(np.concatenate(frames, 1).astype(int) - np.asarray(whole).astype(int))
  assert apart.max() <= 1 and apart.mean() < 1e-3  # the last bit of a rounding
  assert np.ptp(np.asarray(whole)) > 50


def test_prompts_are_embedded_once(folder, monkeypatch):
  sampler = Sampler(folder)
  first = sampler.parts.text(["a red boat", "a cat"])
  monkeypatch.setattr(wan, "load_text", lambda *_: pytest.fail("loaded again"))
  again = Sampler(folder).parts.text(["a  cat", "a red boat"])  # cleaning makes them the same prompts
  np.testing.assert_array_equal(again[::-1], first)
  assert np.any(first[0] != first[1])


@pytest.mark.parametrize(
  "change, line",
  [
    (lambda f: (f / "vae.json").unlink(), "holds no vae; convert one into it: python -m sfjax.convert SRC"),
    (lambda f: (f / "text.json").write_text("{"), "text.json is damaged"),
    (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer cannot be read"),
    (lambda f: shutil.rmtree(f / "dit" / "head.kernel"), "dit.* damaged"),
  ],
)
def test_a_folder_without_a_part_is_refused_in_one_line(change, line, folder, tmp_path, capsys):
  copy = tmp_path / "copy"
  shutil.copytree(folder, copy)
  change(copy)
  with pytest.raises(SystemExit) as e:
    sample.main(["--checkpoint", str(copy), "--prompt", "a cat", "--out", str(tmp_path / "out")])
  text = capsys.readouterr().err
  assert e.value.code == 2 and text.count("\n") == 1
  assert re.search(line, text), text


def test_save_and_continue_equals_the_unbroken_video(folder, tmp_path):
  flags = ["--checkpoint", str(folder), "--prompt", "a cat", "--seed", "3", "--out", str(tmp_path)]
  state = tmp_path / "state.npz"
  sample.main([*flags, "--seconds", "1.3", "--save_state", str(state)])
  sampler = Sampler(folder)
  fresh = sampler.start(["a cat"], 3)
  memory, decoded, prompt, _ = sample_command._load_state(str(state), fresh, sampler.parts.start(1))
  assert prompt == "a cat"
  on, *rest = sampler.stream(memory, 12, 3, [0], decoded=decoded)
  unbroken = list(sampler.stream(fresh, 33, 3, [0]))
  assert not rest
  np.testing.assert_array_equal(on, unbroken[2])


def test_the_next_chunk_is_made_while_the_caller_has_one(folder):
  begun = []
  sampler = spied(Sampler(folder), lambda latents, first: begun.append(first))
  stream = sampler.stream(sampler.start(["a cat"], 3), 45, 3, [0])
  for chunks in (1, 2, 3):
    next(stream)
    deadline = time.monotonic() + 60
    while len(begun) < chunks + 1 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert len(begun) == chunks + 1  # one ahead, unasked, and no more than one
  assert next(stream).shape[1] == 12 and next(stream, None) is None
  assert begun == [True, False, False, False] and stream.memory.chunk[0] == 4
  assert len(stream.seconds) == 4 and all(0 < a and 0 < b for a, b in stream.seconds)


def test_what_fails_in_the_next_chunk_reaches_the_caller(folder):
  def broken(latents, first):
    if not first:
      raise FloatingPointError("broken")

  sampler = spied(Sampler(folder), broken)
  stream = sampler.stream(sampler.start(["a cat"], 3), 33, 3, [0])
  assert next(stream).shape[1] == 9
  with pytest.raises(FloatingPointError, match="broken"):
    next(stream)


def test_a_stream_may_be_left_early(folder):
  begun = []
  sampler = spied(Sampler(folder), lambda latents, first: begun.append(first))
  stream = sampler.stream(sampler.start(["a cat"], 3), 16 * 60, 3, [0])
  next(stream), next(stream)
  del stream  # waits for the chunk that was begun
  made = len(begun)
  time.sleep(0.2)
  assert len(begun) == made <= 3


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory):
  with np.load(FIXTURES / "tiny_vae.npz") as f:
    arrays = {n: weight(n, tuple(map(int, s.split()))).astype(np.float32) for n, s in f["names"]}
  path = tmp_path_factory.mktemp("taehv") / "taew2_1.safetensors"
  save_file(arrays, path)
  return path, arrays


def test_pixels_of_the_tiny_decoder(folder, tiny_decoder, tmp_path):
  path, arrays = tiny_decoder
  seen = []
  sampler = spied(Sampler(folder, tiny_decoder=path), lambda latents, first: seen.append(latents))
  frames = np.concatenate(list(sampler.stream(sampler.start(["a cat"], 3), 21, 3, [0])), 1)
  vae = TinyVAE()
  whole = to_uint8(vae.decode(from_official(vae.config, arrays), jnp.concatenate(seen, 1)))
  apart = np.abs(frames.astype(int) - np.asarray(whole).astype(int))
  assert apart.max() <= 1 and apart.mean() < 1e-3 and np.ptp(frames) > 50
  flags = ["--checkpoint", str(folder), "--prompt", "a cat", "--seconds", "1", "--seed", "3", "--out", str(tmp_path)]
  sample.main([*flags, "--tiny_decoder", str(path)])
  record = json.loads((tmp_path / "run.json").read_text())
  assert record["videos"][0]["frames"] == 16
  assert_told(record["device_bytes"], tiny=True)


def test_a_wrong_tiny_decoder_is_refused_in_one_line(folder, tiny_decoder, tmp_path, capsys):
  other = tmp_path / "other.safetensors"
  save_file({"x": np.zeros(3, np.float32)}, other)
  for flags, line in (
    (
      ["--checkpoint", str(folder), "--prompt", "a cat", "--tiny_decoder", str(other)],
      "--tiny_decoder: .*other.safetensors lacks",
    ),
    (
      ["--checkpoint", str(folder), "--prompt", "a cat", "--tiny_decoder", "none.pth"],
      "--tiny_decoder: none.pth: no such file",
    ),
    (["--tiny_decoder", str(tiny_decoder[0])], "--tiny_decoder: it decodes Wan2.1's latents"),
  ):
    with pytest.raises(SystemExit) as e:
      sample.main([*flags, "--out", str(tmp_path / "out")])
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1 and re.search(line, text), text
