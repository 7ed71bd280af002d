"""Softmax attention: by definition, and by cuDNN's kernel on NVIDIA GPUs."""

from collections.abc import Callable
import importlib.util
from typing import Any, Literal, cast

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from t2t_vit_jax.models.products import einsum

Array = jax.Array
AttentionForm = Literal['auto', 'xla', 'cudnn']


def attention_weights(q: Array, k: Array) -> Array:
  """softmax(q kᵀ), (B, H, T, S), of q (B, T, H, W) and k (B, S, H, W); q is scaled already."""
  return softmax(scores(q, k))


@jax.custom_jvp
def scores(q: Array, k: Array) -> Array:
  """Scores q kᵀ, (B, H, T, S), of q (B, T, H, W) and k (B, S, H, W).

  XLA:CPU has no fast product in half precision for the gradient of k, so in programs for a CPU that is one in float32.
  """
  return einsum('bthd,bshd->bhts', q, k)


@scores.defjvp
def _derivative_of_scores(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
  (q, k), (dq, dk) = primals, tangents

  def wide(q: Array, dk: Array) -> Array:
    return scores(q.astype(jnp.float32), dk.astype(jnp.float32)).astype(q.dtype)

  is_half = jnp.finfo(q.dtype).bits < 32
  of_k = lax.platform_dependent(q, dk, cpu=wide, default=scores) if is_half else scores(q, dk)
  return scores(q, k), scores(dq, k) + of_k


def softmax(x: Array) -> Array:
  """Softmax over the last axis; in half precision `half_softmax`."""
  return nn.softmax(x, axis=-1) if jnp.finfo(x.dtype).bits >= 32 else half_softmax(x)


@jax.custom_jvp
def half_softmax(x: Array) -> Array:
  """Softmax over the last axis of x in half precision, whose derivative is computed in float32.

    dy = y (dx - sum(y dx))

  A sum in half precision is less exact, and takes XLA:CPU many times as long.
  """
  return nn.softmax(x, axis=-1)


@half_softmax.defjvp
def _derivative_of_softmax(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
  (x,), (dx,) = primals, tangents
  y = half_softmax(x)
  wide, dx = y.astype(jnp.float32), dx.astype(jnp.float32)
  return y, (wide * (dx - (wide * dx).sum(axis=-1, keepdims=True))).astype(y.dtype)


def weighted_sum(weights: Array, v: Array) -> Array:
  """Values v (B, S, H, W) summed with the weights (B, H, T, S): (B, T, H, W)."""
  return einsum('bhts,bshd->bthd', weights, v)


def full_attention(q: Array, k: Array, v: Array) -> Array:
  """softmax(q kᵀ) v of each head, (B, T, H, W), of q, k and v (B, T, H, W); q is scaled already."""
  return weighted_sum(attention_weights(q, k), v)


def takes_cudnn(q: Array) -> bool:
  """Whether cuDNN has a kernel for queries (B, T, H, W) of this dtype and width, and this process has jax for CUDA."""
  has_cuda = any(importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13))
  return has_cuda and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def cudnn_attention(
  q: Array, k: Array, v: Array, otherwise: Callable[[Array, Array, Array], Array] = full_attention
) -> Array:
  """Computes `full_attention` by cuDNN's kernel in a program for CUDA, and by `otherwise` in one for another platform.

  The kernel keeps no scores: its backward pass computes them again. It has no forward-mode derivative.
  """
  return cast(Array, lax.platform_dependent(q, k, v, cuda=_kernel, default=otherwise))


@jax.custom_vjp
def _kernel(q: Array, k: Array, v: Array) -> Array:
  return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation='cudnn')


def _kernel_forward(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
  return jax.vjp(padded_attention, q, k, v)


def _kernel_backward(pull_back: Any, cotangent: Array) -> Any:
  return pull_back(cotangent)


_kernel.defvjp(_kernel_forward, _kernel_backward)


def padded_attention(q: Array, k: Array, v: Array, implementation: Any = 'cudnn') -> Array:
  """Computes `full_attention` with one token more if their number T is odd, which cuDNN refuses in training.

  Args:
    q: queries (B, T, H, W), scaled already.
    k: keys.
    v: values.
    implementation: of `jax.nn.dot_product_attention`.
  """
  batch, length, _, _ = q.shape
  odd = length % 2
  q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
  lengths = jnp.full((batch,), length) if odd else None
  y = jax.nn.dot_product_attention(
    q, k, v, scale=1.0, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
  )
  return y[:, :length]
