"""Prints {case: (excess, races)} of the cases of test_gelu_linear.py, in a process of its own."""

import json

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gelu_linear import mosaic_sm90
from tests.gelu_linear.test_gelu_linear import CASES, draw, excess


def run(*shape, multiprocessors):
  x = draw(*shape)
  how = plgpu.InterpretGPUParams(detect_races=True)
  got = mosaic_sm90.gelu_linear(*x, multiprocessors=multiprocessors, interpret=how)
  found = excess(got, *x), interpreter.get_races().races_found
  interpreter.reset_gpu_interpret_mode_state()
  return found


if __name__ == "__main__":
  print(json.dumps({name: run(*shape, multiprocessors=count) for name, (*shape, count) in CASES.items()}))
