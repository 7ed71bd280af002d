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


def kernel_product(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
  """`dot_general` of activations and a layer's kernel (in_dim, out_dim), whose gradient is fast on a CPU too."""
  return dot_general(x, with_direct_gradient(kernel), dimension_numbers, **options)


@jax.custom_jvp
def with_direct_gradient(kernel: Array) -> Array:
  """Returns a kernel (in_dim, out_dim); in programs for a CPU, its gradient is computed as `direct` says."""
  return kernel


@with_direct_gradient.defjvp
def _direct_tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
  return primals[0], direct(tangents[0])


def direct(dkernel: Array) -> Array:
  """Returns a kernel's tangent (in_dim, out_dim), and has its gradient computed as one plain product on a CPU.

    y = x @ kernel,    gradient of kernel = (dy^T @ x)^T

  That is how jax writes it. XLA:CPU joins the product with the transpose around it, and its fast products refuse
  results that are stored column by column. The barrier keeps the two apart.
  """

  def apart(dkernel: Array) -> Array:
    return lax.optimization_barrier(dkernel.swapaxes(-1, -2)).swapaxes(-1, -2)

  return lax.platform_dependent(dkernel, cpu=apart, default=lambda dkernel: dkernel)


einsum = functools.partial(jnp.einsum, _dot_general=dot_general)
