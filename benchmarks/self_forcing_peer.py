"""Self-Forcing in PyTorch, from a clone of its repository, timed chunk by chunk: the peer that `benchmarks.realtime` can run.

python -m benchmarks.self_forcing_peer --clone DIR     (prints JSON; needs torch and einops)

What runs is the clone's own `CausalInferencePipeline`, unchanged: 4 steps and the pass that updates the cache for every
chunk of 3 latents, then its VAE for all of them at once; around its causal model at full size, with random weights in bfloat16.
A chunk's time ends when the device is done with its fifth pass. A first run of the same length warms up.

What is not run is not imported: the text encoder and training. Without diffusers, the two base classes and the decorator that
the model's file takes from it are stood in for; without flash-attn the clone's own way out serves cross-attention too:
PyTorch's scaled_dot_product_attention, here cuDNN's kernel first. Nothing of the clone enters this project.

Caches: "cache", 21 latents and no more, as the repository ships it; "rolling", the last W latents (`local_attn_size`).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
import types

FULL = {"num_layers": 30, "ffn_dim": 8960, "latent_size": (60, 104), "vae_dim": 96}
TINY = {"num_layers": 1, "ffn_dim": 64, "latent_size": (8, 12), "vae_dim": 8}  # heads are fixed in the clone
STEPS, CHUNK = [1000, 750, 500, 250], 3
CACHES = {"cache 21": 21, "rolling 21": 21, "rolling 9": 9}


def stand_in(name: str, **names) -> None:
  """A module of that name with those names alone, in place of one that is not to be run."""
  sys.modules[name] = types.ModuleType(name)
  vars(sys.modules[name]).update(names)


def load(clone: pathlib.Path):
  """The clone's modules: (pipeline, wrapper, model, vae), without those for text and training."""
  import torch

  sys.path.insert(0, str(clone))
  for package in (
    "wan",
    "wan.modules",
    "pipeline",
    "utils",
    "demo_utils",
  ):  # not their __init__, which import everything
    stand_in(package, __path__=[str(clone.joinpath(*package.split(".")))])
  stand_in("wan.modules.tokenizers", HuggingfaceTokenizer=None)
  stand_in("wan.modules.t5", umt5_xxl=None)
  unused = ("gpu", "get_cuda_free_memory_gb", "DynamicSwapInstaller", "move_model_to_device_with_memory_preservation")
  stand_in("demo_utils.memory", **dict.fromkeys(unused))
  if importlib.util.find_spec("diffusers") is None:
    stand_in("diffusers")
    stand_in("diffusers.models")
    stand_in("diffusers.models.modeling_utils", ModelMixin=torch.nn.Module)
    stand_in("diffusers.configuration_utils", ConfigMixin=object, register_to_config=lambda init: init)
  from pipeline import causal_inference
  from utils import wan_wrapper
  from wan.modules import attention, causal_model, model, vae

  if not fused(attention):
    model.flash_attention = attention.attention
  return causal_inference, wan_wrapper, causal_model, vae, attention


def fused(attention) -> bool:
  """Whether the clone found flash-attn."""
  return attention.FLASH_ATTN_2_AVAILABLE or attention.FLASH_ATTN_3_AVAILABLE


def build(modules, sizes: dict, local_attn_size: int, device: str):
  """The clone's pipeline with random weights on the device."""
  import torch

  causal_inference, wan_wrapper, causal_model, vae, _ = modules
  dit = {"dim": 1536, "num_heads": 12, "num_layers": sizes["num_layers"], "ffn_dim": sizes["ffn_dim"]}
  random_model = classmethod(lambda cls, path, **options: cls(**dit, **options))
  causal_model.CausalWanModel.from_pretrained = random_model
  wan_wrapper._video_vae = lambda z_dim, **_: vae.WanVAE_(
    dim=sizes["vae_dim"], z_dim=z_dim, num_res_blocks=2, temperal_downsample=[False, True, True]
  )
  with torch.device(device):
    generator = wan_wrapper.WanDiffusionWrapper(is_causal=True, timestep_shift=5.0, local_attn_size=local_attn_size)
    torch.nn.init.xavier_uniform_(generator.model.head.head.weight)  # zeros would make every chunk its noise
    decoder = wan_wrapper.WanVAEWrapper()
    text = torch.randn(1, 512, 4096, dtype=torch.bfloat16)
  args = types.SimpleNamespace(
    denoising_step_list=STEPS,
    warp_denoising_step=True,
    num_frame_per_block=CHUNK,
    independent_first_frame=False,
    context_noise=0,
  )
  encoder = lambda text_prompts: {"prompt_embeds": text}
  pipeline = causal_inference.CausalInferencePipeline(args, device, generator, encoder, decoder)
  pipeline.num_transformer_blocks = sizes["num_layers"]
  pipeline.frame_seq_length = sizes["latent_size"][0] * sizes["latent_size"][1] // 4
  return pipeline.to(device=device, dtype=torch.bfloat16)


def timed(pipeline, noise, synchronize) -> tuple[list[float], float]:
  """Seconds of every chunk's passes, and from the last of them to the video."""
  began, passes = [], 0

  def before(*_):
    if not began:
      synchronize()
      began.append(time.perf_counter())

  def after(*_):
    nonlocal passes
    passes += 1
    if passes % (len(STEPS) + 1) == 0:
      synchronize()
      began.append(time.perf_counter())

  hooks = pipeline.generator.register_forward_pre_hook(before), pipeline.generator.register_forward_hook(after)
  video = pipeline.inference(noise, ["x"])
  synchronize()
  end = time.perf_counter()
  for hook in hooks:
    hook.remove()
  if not video.isfinite().all() or not video.std() > 0:
    raise RuntimeError("the pixels are all the same, or not finite: nothing was computed")
  return [b - a for a, b in zip(began, began[1:], strict=False)], end - began[-1]


def measure(modules, name: str, chunks: int, sizes: dict, device: str) -> dict:
  """A row: times of a cache's chunks, and what follows from them."""
  import torch

  window, rolling = CACHES[name], name.startswith("rolling")
  chunks = chunks if rolling else min(chunks, window // CHUNK)
  cuda = device == "cuda"
  synchronize = torch.cuda.synchronize if cuda else lambda: None
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  pipeline = build(modules, sizes, window if rolling else -1, device)
  noise = torch.randn(1, chunks * CHUNK, 16, *sizes["latent_size"], dtype=torch.bfloat16, device=device)
  timed(pipeline, noise, synchronize)
  times, decode = timed(pipeline, noise, synchronize)
  full = times[window // CHUNK :] or times[-1:]  # the shipped cache is full in its last chunk alone
  frames, per_chunk = 4 * CHUNK * chunks - 3, 4 * CHUNK
  cached = [x for layer in pipeline.kv_cache1 for x in (layer["k"], layer["v"])]
  return {
    "cache": name,
    "frames": frames,
    "chunk_times_s": times,
    "decode_s": decode,
    "fps_denoiser": per_chunk / sorted(full)[len(full) // 2],
    "fps_end_to_end": frames / (sum(times) + decode),
    "kv_bytes": sum(x.nbytes for x in cached),
    "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
  }


def run_beside(clone: str) -> dict:
  """What this program prints, run as one of its own; {"skipped": why} where the clone or PyTorch do not serve."""
  try:
    command = [sys.executable, "-m", "benchmarks.self_forcing_peer", "--clone", clone]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    return json.loads(done.stdout.splitlines()[-1])
  except subprocess.TimeoutExpired:
    return {"skipped": "it took longer than half an hour"}
  except (IndexError, ValueError):
    return {"skipped": " ".join(done.stderr.split())[-300:] or f"it ended with code {done.returncode}"}


def main(argv: list[str]) -> None:
  """Prints one line of JSON: {"rows": [...], ...} or {"skipped": why}."""
  p = argparse.ArgumentParser(prog="python -m benchmarks.self_forcing_peer", description=__doc__.splitlines()[0])
  p.add_argument("--clone", required=True, metavar="DIR")
  p.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
  p.add_argument("--chunks", type=int, default=12, help="of a rolling cache's video")
  p.add_argument("--tiny", action="store_true", help="one layer and small frames, on a CPU")
  a = p.parse_args(argv)
  clone = pathlib.Path(a.clone).resolve()
  try:
    if not (clone / "pipeline" / "causal_inference.py").is_file():
      raise FileNotFoundError(f"{a.clone} is not a clone of guandeh17/Self-Forcing")
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cpu" if a.tiny else "cuda"
    torch.manual_seed(0)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), torch.no_grad():  # it prints every step
      modules = load(clone)
      with sdpa_kernel(order, set_priority=True):
        rows = [measure(modules, name, a.chunks, TINY if a.tiny else FULL, device) for name in a.caches]
    git = subprocess.run(["git", "--git-dir", str(clone / ".git"), "rev-parse", "HEAD"], capture_output=True, text=True)
    found = {
      "rows": rows,
      "attention": "flash-attn" if fused(modules[-1]) else "scaled_dot_product_attention, cuDNN first",
      "device": torch.cuda.get_device_name() if device == "cuda" else device,
      "torch": torch.__version__,
      "cudnn": torch.backends.cudnn.version(),
      "commit": git.stdout.strip() or None,
    }
  except Exception as e:
    found = {"skipped": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
  print(json.dumps(found))


if __name__ == "__main__":
  main(sys.argv[1:])
