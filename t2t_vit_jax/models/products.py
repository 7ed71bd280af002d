"""Matrix products of the layers: float32 means float32 on every platform."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array
Dtype = Any


def product_precision(dtype: Dtype) -> lax.Precision | None:
  """Precision of products whose factors have this dtype: `HIGHEST` for float32, so that no factor is rounded.

  By default, jax rounds float32 factors to TF32 on recent GPUs, which moves the logits of t2t_vit_14 by 2e-3 of their
  deviation, and to bfloat16 on TPUs, which moves them by 1.5e-2, as much as computing in bfloat16 does. The price of
  `HIGHEST` is six passes of the TPU's matrix unit in place of one, and a GPU's float32 units in place of its tensor
  cores. `DEFAULT` for narrower dtypes. None, jax's own way, where the caller has set `jax_default_matmul_precision`.
  """
  if jax.config.jax_default_matmul_precision is not None:  # type: ignore[attr-defined]
    return None
  return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else lax.Precision.DEFAULT


def dot_general(x: Array, y: Array, dimension_numbers: Any, precision: Any = None, **options: Any) -> Array:
  """`lax.dot_general` with `product_precision` in place of jax's default."""
  if precision is None:
    precision = product_precision(jnp.promote_types(x.dtype, y.dtype))
  return lax.dot_general(x, y, dimension_numbers, precision=precision, **options)


einsum = functools.partial(jnp.einsum, _dot_general=dot_general)
