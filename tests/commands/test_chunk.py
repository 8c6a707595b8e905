"""`python -m benchmarks.chunk`: kernels sorted into stages, and the command at toy size."""

import json

import pytest

from benchmarks import chunk

HLO = """
  %fusion.297 = bf16[4680,1536]{1,0} fusion(%a, %b), metadata={op_name="jit(rollout_chunk)/while/body/layers/mul" id=1}
  %sort.27 = (f32[4,8]) sort(%c), metadata={op_name="jit(rollout_chunk)/while/body/layers/lists/top_k"}
  ROOT %loop_add_fusion = s32[] fusion(%d), metadata={op_name="jit(rollout_chunk)/memory/vmap/add"}
  %loop_convert_fusion.1 = f32[] fusion(%e), metadata={op_name="jit(rollout_chunk)/convert"}
"""


def test_stages_of_kernels():
  inside = chunk.scopes(HLO)
  assert inside == {"fusion_297": "layers", "sort_27": "lists", "loop_add_fusion": "memory"}
  for kernel, stage in (
    ("pbsa_join_mosaic_gpu_kernel", "pbsa"),
    ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "exchange"),
    ("to_slots_mosaic_gpu_kernel", "slots"),
    ("few_keys_mosaic_gpu_kernel", "cross-attention"),
    ("nvjet_sm90_tst_192x144_64x5_2x1_v_bz_coopB_NNT", "products"),
    ("gelu_linear_mosaic_gpu_kernel", "products"),
    ("add_norm_mosaic_gpu_kernel", "layers"),
    ("void cutlass::Kernel2<cutlass_80_wmma>", "products"),
    ("memcpy32_post", "copies"),
    ("fusion_297", "layers"),
    ("sort_27_1", "lists"),  # one of the kernels of an instruction
    ("loop_add_fusion", "memory"),
    ("loop_convert_fusion_1", "other"),
  ):
    assert chunk.stage_of(kernel, inside) == stage


def test_times_of_stages():
  """Of two chunks; the copy runs beside the product, and 1 ms lies between that and the norm."""
  events = [("nvjet", 0, 4e6), ("memcpy128", 1e6, 2e6), ("fusion_297", 5e6, 1e6), ("nvjet", 6e6, 4e6)]
  found = chunk.by_stage(events, chunk.scopes(HLO), 2)
  assert found["busy_ms"] == pytest.approx(4.5) and found["gaps_ms"] == pytest.approx(0.5) and found["kernels"] == 2
  assert found["stages_ms"] == pytest.approx({"products": 4, "copies": 1, "layers": 0.5})
  assert found["longest"][0] == {"name": "nvjet", "stage": "products", "ms": pytest.approx(4), "times": 1}


def test_the_command(tmp_path, capsys):
  sizes = (
    "dim=64 layers=2 heads=2 ffn_dim=96 text_dim=32 text_len=48 freq_dim=32 latent_size=(8,12) tile=(3,2,1)".split()
  )
  flags = [f"--config.model.{x}" for x in [*sizes, "block_tokens=13", "dtype=float32"]]
  flags += ["--config.memory.persistent=4", "--chunks", "2", "--profiled", "1", "--out", str(tmp_path)]
  chunk.main(flags)
  record = json.loads((tmp_path / "chunk.json").read_text())
  assert record["chunk"]["count"] == 2 and record["chunk"]["p50"] > 0 and "ms a chunk" in capsys.readouterr().out
  assert record["config"]["memory"]["persistent"] == 4


def test_wrong_flags(capsys):
  with pytest.raises(SystemExit):
    chunk.main(["--words", "513"])
  assert "--words: 513; want 0..512" in capsys.readouterr().err
