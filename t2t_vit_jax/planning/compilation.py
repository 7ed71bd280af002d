"""Compiles a program for chips that need not be there, and tells what memory, work and time it takes."""

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

import jax

from t2t_vit_jax.planning.gpu import Gpu
from t2t_vit_jax.planning.schedule import read_schedule
from t2t_vit_jax.planning.topology import Topology
from t2t_vit_jax.planning.tpu import Chip


class DoesNotFit(Exception):  # noqa: N818 (an answer, not an error)
  """A program needs more memory than a chip has; the text is the compiler's."""


def compile_program(function: jax.stages.Wrapped, arguments: Sequence[Any], topology: Topology) -> tuple[Any, float]:
  """Compiles a jitted function for the devices of its arguments' shardings, which are some of `topology`.

  Returns:
    The `jax.stages.Compiled`, and the seconds that the compiler took.

  Raises:
    DoesNotFit: the program needs more memory than a device has.
  """
  lowered = function.lower(*arguments)
  start = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=topology.compiler_options)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFit(shortage(str(error))) from error
  seconds = time.perf_counter() - start
  needed, there = sum(_sizes(compiled).values()) / 2**30, topology.chip.hbm_gib
  if needed > there:  # the compiler for GPUs does not refuse
    raise DoesNotFit(f'the program needs {needed:.2f} GiB of {there:.2f} GiB')
  return compiled, seconds


def _sizes(compiled: Any) -> dict[str, int]:
  """Bytes that a program takes on a chip, by what they are for."""
  memory = compiled.memory_analysis()
  return {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,  # less those in an argument's place
    'program': memory.generated_code_size_in_bytes,
  }


def figures(compiled: Any, chip: Chip | Gpu, product_flops: float, parts: int = 1) -> dict[str, Any]:
  """Figures of a compiled program, for each chip: bytes of memory, work, and the time it may take.

  Args:
    compiled: from `compile_program`.
    chip: the chip that it was compiled for.
    product_flops: operations of its products on a chip, which stand for all where the compiler does not count (GPUs).
    parts: number of parts of a batch that it computes one after the other, in a loop that XLA's FLOP count has once.
  """
  costs, sizes = compiled.cost_analysis(), _sizes(compiled)
  schedule = read_schedule(compiled.as_text())
  flops = costs['flops'] * parts if costs else product_flops  # all but a thousandth of the work is in the loop
  arithmetic_ms, bandwidth_ms = 1e3 * flops / chip.flops, 1e3 * schedule.hbm_bytes / chip.bandwidth
  return {
    'memory': sum(sizes.values()),
    **sizes,
    'flops': flops,
    **dataclasses.asdict(schedule),
    'arithmetic_ms': arithmetic_ms,
    'bandwidth_ms': bandwidth_ms,
    'roofline_ms': max(arithmetic_ms, bandwidth_ms),  # if work and transfers overlap
    **({'compiler_estimate_ms': 1e3 * schedule.cycles / chip.clock} if isinstance(chip, Chip) else {}),
  }


def shortage(message: str) -> str:
  """The compiler's line about the lack of memory, without the list of buffers that follows."""
  paragraph = message.split('RESOURCE_EXHAUSTED:')[1].strip().split('\n\n')[0]
  return ' '.join(paragraph.split())[:300]
