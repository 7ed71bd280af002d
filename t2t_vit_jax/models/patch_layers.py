"""Dense layers over the patches of a soft split: by definition, and as convolutions that never form the patches."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax.models.layers import EPSILON, Dense, Dtype, LayerNorm, add_bias
from t2t_vit_jax.models.products import product_precision
from t2t_vit_jax.models.soft_split import Split, soft_split

Array = jax.Array
Params = Mapping[str, Array]
SoftSplitForm = Literal['conv', 'patches']


def patch_dense(x: Array, split: Split, dense: Params, *, form: SoftSplitForm = 'conv', dtype: Dtype) -> Array:
  """Applies a Dense layer to every patch: (B, H, W, C) -> (B, H', W', out).

  Args:
    x: images or tokens on their grid.
    split: where the patches lie.
    dense: `kernel` (C * kernel * kernel, out) and perhaps `bias` (out,).
    form: 'patches' is the definition, the layer applied to `soft_split`. 'conv' is the same linear map as a strided
      convolution, which forms no patches.
    dtype: of computation and result.
  """
  if form == 'patches':
    return _dense(soft_split(x, split), dense, dtype)
  y = _convolve(x.astype(dtype), dense['kernel'], split, padding=split.padding).astype(dtype)
  return add_bias(y, dense['bias']) if 'bias' in dense else y


def patch_norm_dense(
  x: Array, split: Split, norm: Params, dense: Params, parts: int, *, form: SoftSplitForm = 'conv', dtype: Dtype
) -> list[Array]:
  """Applies LayerNorm and a Dense layer to every patch: (B, H, W, C) -> `parts` arrays (B, H', W', out // parts).

  With the mean and the deviation of a patch, and the layers' parameters,

    x_hat  = (patch - mean) / deviation
    result = (x_hat * scale + bias) @ kernel + b
           = (patch - mean) @ weights / deviation + offset
    weights = scale[:, None] * kernel, less each column's mean: it adds nothing, since patch - mean sums to 0
    offset  = bias @ kernel + b

  The second line is the form 'patches', the third is 'conv': a strided convolution with `weights`, divided by
  deviations that come from sums over windows. Patches, which hold every pixel three times and every token 2.25 times,
  are never formed, nor is their gradient.

  Rounding: for a result in float32, `_subtract_references` subtracts a value near the patch's mean before anything is
  multiplied or squared. Otherwise the rounding of what all values have in common would grow up to 316-fold
  (1 / deviation) in a flat patch. In half precision that error is small beside the rounding of the result.

  Args:
    x: images or tokens on their grid.
    split: where the patches lie.
    norm: `scale` and `bias`, (C * kernel * kernel,).
    dense: `kernel` (C * kernel * kernel, out) and perhaps `bias` (out,).
    parts: number of equal parts of the result. Each is computed by itself, which costs less than cutting it up.
    form: 'patches' is the definition, the layers applied to `soft_split`.
    dtype: of computation and result.
  """
  if form == 'patches':
    patches = _centred(soft_split(x, split))
    return jnp.split(_dense(LayerNorm(dtype=dtype).apply({'params': norm}, patches), dense, dtype), parts, axis=-1)
  weights = norm['scale'][:, None] * dense['kernel']
  weights = (weights - weights.mean(axis=0, keepdims=True)).astype(dtype)
  offset = jnp.einsum('i,io->o', norm['bias'], dense['kernel'], precision=lax.Precision.HIGHEST)
  offset = offset + dense.get('bias', 0)

  multiply, variance = (_half_products if jnp.finfo(dtype).bits < 32 else _float32_products)(x, split)
  inverse_deviation = lax.rsqrt(variance + EPSILON)
  parts_of_layer = zip(jnp.split(weights, parts, axis=-1), jnp.split(offset, parts), strict=True)
  return [(multiply(w) * inverse_deviation + _per_channel(o)).astype(dtype) for w, o in parts_of_layer]


def _dense(x: Any, params: Params, dtype: Dtype) -> Any:
  return Dense(params['kernel'].shape[-1], use_bias='bias' in params, dtype=dtype).apply({'params': params}, x)


def _float32_products(x: Array, split: Split) -> tuple[Callable[[Array], Array], Array]:
  """Returns a function, kernel -> (patch - mean) @ kernel, and the variances of the patches, (B, H', W', 1)."""
  u, references = _subtract_references(x.astype(jnp.float32), split)
  mean, variance = _moments(u, references, split)
  return lambda kernel: _products(u, references - mean, kernel, split), variance


def _half_products(x: Array, split: Split) -> tuple[Callable[[Array], Array], Array]:
  """Returns the same as `_float32_products` at less cost, for results that are rounded to half precision.

  Tokens have half precision already. Images are multiplied in float32, so that the mean may be subtracted after the
  product: on a TPU by three products of half precision (`Precision.HIGH`), which round nothing that counts; on a GPU by
  one product of TF32, whose rounding of the image adds nothing to what half precision costs elsewhere (simulated: the
  logits of t2t_vit_14 are off by 1.4e-2 to 1.6e-2 of their deviation either way); on a CPU in float32.
  """
  precision = lax.Precision.HIGH if jnp.finfo(x.dtype).bits >= 32 else lax.Precision.DEFAULT
  size = split.kernel**2 * x.shape[-1]
  wide = x.astype(jnp.float32)
  mean = _window_sums(wide, split) / size
  variance = jnp.maximum(_window_sums(wide * wide, split) / size - mean**2, 0)  # rounding may pass 0

  def multiply(kernel: Array) -> Array:
    y = _convolve(x, kernel, split, precision, padding=split.padding)
    return y - mean * _per_channel(kernel.astype(jnp.float32).sum(axis=0))

  return multiply, variance


def _window_sums(x: Array, split: Split) -> Array:
  """Sums of all values of each patch: (B, H, W, C) -> (B, H', W', 1)."""
  if x.shape[-1] > split.stride:  # the axis that shrinks most goes first
    x = x.sum(axis=-1, keepdims=True)
  for axis in (1, 2):
    window, strides, padding = [1] * 4, [1] * 4, [(0, 0)] * 4
    window[axis], strides[axis], padding[axis] = split.kernel, split.stride, (split.padding,) * 2
    x = lax.reduce_window(x, np.float32(0), lax.add, window, strides, padding)
  return x.sum(axis=-1, keepdims=True)


def _subtract_references(x: Array, split: Split) -> tuple[Array, Array]:
  """Subtracts references from the zero-padded x: values near its own that are known for every patch.

  Patches overlap, so references belong to cells of stride x stride: a cell's reference is its first pixel's mean over
  the channels. A patch lies in 2 x 2 cells, without the last row or column of the latter ones; the first pixel of each
  belongs to it. The results of LayerNorm do not depend on the references, so no gradient flows through them.

  Args:
    x: (B, H, W, C).
    split: where the patches lie.

  Returns:
    The padded x less its references, (B, stride * (H' + 1), stride * (W' + 1), C); and the references of each
    patch's four cells less that of the first, (B, H', W', 4).
  """
  assert split.kernel == 2 * split.stride - 1, f'{split}: a patch must lie in 2 x 2 cells of stride x stride'
  height, width = (split.output_size(size) + 1 for size in x.shape[1:3])
  padding = [
    (split.padding, cells * split.stride - split.padding - size, 0)
    for cells, size in zip((height, width), x.shape[1:3], strict=True)
  ]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
  cells = x.reshape(-1, height, split.stride, width, split.stride, x.shape[-1])
  reference = lax.stop_gradient(cells[:, :, 0, :, 0].mean(axis=-1))
  u = (cells - reference[:, :, None, :, None, None]).reshape(x.shape)
  first = reference[:, :-1, :-1]
  others = (reference[:, :-1, 1:], reference[:, 1:, :-1], reference[:, 1:, 1:])
  return u, jnp.stack([jnp.zeros_like(first), *(other - first for other in others)], axis=-1)


def _moments(u: Array, references: Array, split: Split) -> tuple[Array, Array]:
  """Mean of each patch less its first cell's reference, and its variance: both (B, H', W', 1), float32."""
  cells = _cells_of_patch(u.shape[-1], split)
  size, cell_sizes = len(cells), cells.sum(axis=0).reshape(1, 1, 1, -1)
  sums = _convolve(u, jnp.asarray(cells, u.dtype), split, lax.Precision.HIGHEST)
  squares = _convolve(u * u, jnp.ones((size, 1), u.dtype), split, lax.Precision.HIGHEST)
  mean = (sums + references * cell_sizes).sum(axis=-1, keepdims=True) / size
  squares += ((2 * sums + references * cell_sizes) * references).sum(axis=-1, keepdims=True)
  return mean, squares / size - mean**2


def _products(u: Array, references: Array, kernel: Array, split: Split) -> Array:
  """(patch of u + its references, cell by cell) @ kernel: (B, H', W', out), float32."""
  y = _convolve(u, kernel, split)
  cells = _cells_of_patch(u.shape[-1], split)
  sums = jnp.einsum('ic,io->co', cells, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
  for i in range(len(sums)):
    y += references[..., i : i + 1] * _per_channel(sums[i])
  return y


def _cells_of_patch(channels: int, split: Split) -> np.ndarray:
  """Table of the 2 x 2 cells in which each value of a patch lies: (channels * kernel * kernel, 4), 0 or 1."""
  second = np.arange(split.kernel) >= split.stride
  cells = [np.outer(rows, columns).ravel() for rows in (~second, second) for columns in (~second, second)]
  return np.tile(np.stack(cells, axis=-1), (channels, 1)).astype(np.float32)


def _centred(x: Array) -> Array:
  """Subtracts the mean over the last axis, in float32, before a LayerNorm over patches, whose result stays the same.

  In a constant patch the variance is 0, and LayerNorm multiplies the rounding error of its own mean with
  epsilon ** -0.5 = 316: enough to move logits by 7e-5. A second mean, over centred values, has no such error.
  """
  x = x.astype(jnp.float32)
  return x - x.mean(axis=-1, keepdims=True)


def _per_channel(x: Array) -> Array:
  return x.reshape(1, 1, 1, -1)


def _convolve(
  x: Array, kernel: Array, split: Split, precision: lax.Precision | None = None, *, padding: int = 0
) -> Array:
  """Products of each patch of the padded (B, H, W, C) with a kernel (C * kernel * kernel, out), in float32."""

  def convolve(x: Array, kernel: Array, result: Dtype = jnp.float32) -> Array:
    return lax.conv_general_dilated(
      x,
      kernel,
      (split.stride, split.stride),
      [(padding, padding)] * 2,
      dimension_numbers=('NHWC', 'IHWO', 'NHWC'),
      precision=product_precision(x.dtype) if precision is None else precision,
      preferred_element_type=result,
    )

  def rounded(x: Array, kernel: Array) -> Array:
    return convolve(x, kernel, x.dtype).astype(jnp.float32)

  kernel = kernel.reshape(x.shape[-1], split.kernel, split.kernel, -1).astype(x.dtype)
  if jnp.finfo(x.dtype).bits >= 32:
    return convolve(x, kernel)
  # For CUDA, XLA computes a float32 result from float32 copies of both factors: cuDNN has no other way.
  return cast(Array, lax.platform_dependent(x, kernel, cuda=rounded, default=convolve))
