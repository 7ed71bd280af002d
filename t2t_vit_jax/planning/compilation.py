"""Compiles a program for chips that need not be there, and tells what memory, work and time it takes."""

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

import jax

from t2t_vit_jax.planning.schedule import read_schedule
from t2t_vit_jax.planning.tpu import Chip


class DoesNotFit(Exception):  # noqa: N818 (an answer, not an error)
  """A program needs more memory than a chip has; the text is the compiler's."""


def compile_program(function: jax.stages.Wrapped, arguments: Sequence[Any]) -> tuple[Any, float]:
  """Compiles a jitted function for the devices of its arguments' shardings.

  Returns:
    The `jax.stages.Compiled`, and the seconds that the compiler took.

  Raises:
    DoesNotFit: the program needs more memory than a device has.
  """
  lowered = function.lower(*arguments)
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFit(shortage(str(error))) from error
  return compiled, time.perf_counter() - start


def figures(compiled: Any, chip: Chip, parts: int = 1) -> dict[str, Any]:
  """Figures of a program compiled for TPU, for each chip: bytes of memory, work, and the time it may take.

  Args:
    compiled: from `compile_program`.
    chip: the chip that it was compiled for.
    parts: number of parts of a batch that it computes one after the other, in a loop that XLA's FLOP count has once.
  """
  memory = compiled.memory_analysis()
  schedule = read_schedule(compiled.as_text())
  flops = compiled.cost_analysis()['flops'] * parts  # all but a thousandth of the work is in the loop
  sizes = {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,  # less those in an argument's place
    'program': memory.generated_code_size_in_bytes,
  }
  return {
    'memory': sum(sizes.values()),
    **sizes,
    'flops': flops,
    **dataclasses.asdict(schedule),
    'roofline_ms': 1e3 * chip.roofline_s(flops, schedule.hbm_bytes),
    'compiler_estimate_ms': 1e3 * schedule.cycles / chip.clock,
  }


def shortage(message: str) -> str:
  """The compiler's line about the lack of memory, without the list of buffers that follows."""
  paragraph = message.split('RESOURCE_EXHAUSTED:')[1].strip().split('\n\n')[0]
  return ' '.join(paragraph.split())[:300]
