"""Published peaks of devices by the names that JAX gives them."""

import re

from t2t_vit_jax.planning.gpu import GPUS
from t2t_vit_jax.planning.tpu import CHIPS

# What JAX calls a device, and its peak of dense bfloat16 products. Peaks are those of `tpu` and `gpu`, and of
# https://www.nvidia.com/en-us/data-center/h100/ for the card.
TPU_KINDS = {'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5p': 'v5p', 'TPU v5': 'v5p'}
TPU_KINDS |= {'TPU v6 lite': 'v6e', 'TPU v6e': 'v6e'}
GPU_PEAKS = {
  'A100': GPUS['a100'].flops,
  'H100 PCIe': 756.5e12,
  'H100 80GB HBM3': GPUS['h100'].flops,
  'H200': GPUS['h200'].flops,
  'B200': GPUS['b200'].flops,
}


def peak_flops(kind: str) -> float | None:
  """Published bfloat16 operations a second of a device by JAX's name for it; None if it is not known here."""
  if kind in TPU_KINDS:
    return CHIPS[TPU_KINDS[kind]].flops
  if 'NVL' in kind:  # cards of less power
    return None
  return next((peak for name, peak in GPU_PEAKS.items() if re.search(rf'\b{name}\b', kind)), None)
