"""Machines that programs are compiled for without being there: slices of TPUs, or GPUs."""

import re

from t2t_vit_jax.errors import UserError, did_you_mean
from t2t_vit_jax.planning import gpu, tpu

EXAMPLES = f'{tpu.EXAMPLES}, or {gpu.EXAMPLES}'
Topology = tpu.Slice | gpu.Node


def parse(text: str) -> Topology:
  """Parses a slice such as 'v5e:2x2' or GPUs such as 'h100:8'; UserError if `text` is neither."""
  match = re.match(r'\w+', text)
  name = match[0] if match else text
  if name in gpu.GPUS:
    return gpu.Node.parse(text)
  if name in tpu.CHIPS:
    return tpu.Slice.parse(text)
  known = did_you_mean(name, [*tpu.CHIPS, *gpu.GPUS])
  raise UserError(f'unknown chip {name!r} in {text!r}: {known} (such as {EXAMPLES})')
