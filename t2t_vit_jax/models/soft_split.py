"""The soft split: overlapping patches, T2T-ViT's way from an image (or a token grid) to fewer, wider tokens."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.layers import EPSILON, Dense, Dtype, LayerNorm

Array = jax.Array
Params = Mapping[str, Array]
SoftSplitForm = Literal['conv', 'patches']


class Split(NamedTuple):
  """Geometry of one soft split, in pixels (or tokens) of its input, the same along both axes."""

  kernel: int
  stride: int
  padding: int

  def output_size(self, size: int) -> int:
    """Number of patches along an axis of `size`: 0 or less if it is too short for one."""
    return (size + 2 * self.padding - self.kernel) // self.stride + 1


# The paper's three splits: 224 px -> 56 x 56 -> 28 x 28 -> 14 x 14 tokens.
SPLITS = (Split(7, 4, 2), Split(3, 2, 1), Split(3, 2, 1))


def token_grid(image_size: tuple[int, int]) -> tuple[int, int]:
  """(H, W) of the token grid that the three splits leave of an image of (height, width) pixels.

  Raises:
    UserError: the image is too small for a split.
  """
  grid = image_size
  for number, split in enumerate(SPLITS):
    smaller = split.output_size(grid[0]), split.output_size(grid[1])
    if min(smaller) < 1:
      raise UserError(
        f'an image of {image_size[0]} x {image_size[1]} px is too small: soft split {number} (kernel '
        f'{split.kernel}, stride {split.stride}, padding {split.padding}) finds no patch in {grid[0]} x {grid[1]}; '
        'use larger images'
      )
    grid = smaller
  return grid


def soft_split(x: Array, split: Split) -> Array:
  """Cuts overlapping, zero-padded patches: (B, H, W, C) -> (B, H', W', C * kernel * kernel).

  A patch is flattened channel-major, index = (c * kernel + row) * kernel + column, like torch's
  Unfold. The padding's zeros are part of the patches.
  """
  return lax.conv_general_dilated_patches(
    x,
    filter_shape=(split.kernel, split.kernel),
    window_strides=(split.stride, split.stride),
    padding=[(split.padding, split.padding)] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    # Copies, not arithmetic: lower precision would round float32 pixels on their way into the patch.
    precision=lax.Precision.HIGHEST,
  )


def patch_dense(x: Array, split: Split, dense: Params, *, form: SoftSplitForm = 'conv', dtype: Dtype) -> Array:
  """A Dense layer of every patch: (B, H, W, C) -> (B, H', W', out).

  Args:
    x: images or tokens on their grid.
    split: where the patches lie.
    dense: `kernel` (C * kernel * kernel, out) and perhaps `bias` (out,).
    form: 'patches' is the definition, the layer applied to `soft_split`. 'conv' is the same linear map of the
      same numbers as a strided convolution, which forms no patches.
    dtype: of computation and result.
  """
  if form == 'patches':
    return _dense(soft_split(x, split), dense, dtype)
  padding = [(0, 0), (split.padding,) * 2, (split.padding,) * 2, (0, 0)]
  y = _convolve(jnp.pad(x.astype(dtype), padding), dense['kernel'], split)
  return y + _per_channel(dense['bias']).astype(dtype) if 'bias' in dense else y


def patch_norm_dense(
  x: Array, split: Split, norm: Params, dense: Params, *, form: SoftSplitForm = 'conv', dtype: Dtype
) -> Array:
  """LayerNorm, then a Dense layer of every patch: (B, H, W, C) -> (B, H', W', out).

  With mean m and deviation s of a patch p, the two layers are

    ((p - m) / s * scale + bias) @ kernel + b  =  (p - m) @ A / s + (bias @ kernel + b),    A = scale[:, None] * kernel

  and (p - m) @ A = p @ A', where A' is A less each column's mean. So the form 'conv' is a strided
  convolution of x with A', divided by deviations that come from sums over windows: patches, which
  hold every pixel three times and every token 2.25 times, are never formed, nor is their gradient.
  Arguments as for `patch_dense`, and `norm`: `scale` and `bias`, (C * kernel * kernel,).

  Rounding: LayerNorm does not see a number subtracted from all of an image, padding included. That of
  its middle pixel is, so that a large common offset costs no digits; `_centred_products` does the
  same for parts of a patch.
  """
  if form == 'patches':
    patches = soft_split(x, split)
    return _dense(LayerNorm(dtype=dtype).apply({'params': norm}, _centred(patches)), dense, dtype)
  x = x.astype(jnp.float32)
  middle = x[:, x.shape[1] // 2, x.shape[2] // 2].mean(axis=-1).reshape(-1, 1, 1, 1)
  x = _pad_to_cells(x, split) - lax.stop_gradient(middle)
  kernel = norm['scale'][:, None] * dense['kernel']
  kernel = (kernel - kernel.mean(axis=0, keepdims=True)).astype(dtype)
  mean, variance = _window_moments(x, split)
  y = _centred_products(x, mean, kernel, split) * lax.rsqrt(variance + EPSILON)
  constant = jnp.einsum('i,io->o', norm['bias'], dense['kernel'], precision=lax.Precision.HIGHEST)
  return (y + _per_channel(constant + dense.get('bias', 0))).astype(dtype)


def _dense(x: Any, params: Params, dtype: Dtype) -> Any:
  return Dense(params['kernel'].shape[-1], use_bias='bias' in params, dtype=dtype).apply({'params': params}, x)


def _centred_products(x: Array, mean: Array, kernel: Array, split: Split) -> Array:
  """(p - mean) @ kernel of every patch p, in float32, where the kernel's columns sum to 0 but for rounding.

  What a patch's values have in common must be taken out before the convolution, which would round it,
  for in a flat patch 1 / s is up to 316. As patches overlap it is done by cells of stride x stride:
  each subtracts its first pixel (mean over channels), its reference r. A patch lies in four cells,
  and if S_c is the sum of the kernel's rows in cell c, and r_0 the first cell's reference,

    (p - mean) @ kernel = u @ kernel + (r_1 - r_0) S_1 + (r_2 - r_0) S_2 + (r_3 - r_0) S_3 - (mean - r_0) sum(S)

  with the patch u of x less the references. In a flat patch all terms but the last are 0, and there
  sum(S) is. The references are no part of the result, so no gradient flows through them.

  Args:
    x: (B, H, W, C), float32, padded by `_pad_to_cells`.
    mean: of every patch, (B, H', W', 1).
    kernel: (C * kernel * kernel, out), in the dtype to multiply in.
    split: where the patches lie.
  """
  batch, height, width, channels = x.shape
  stride = split.stride
  cells = x.reshape(batch, height // stride, stride, width // stride, stride, channels)
  reference = lax.stop_gradient(cells[:, :, :1, :, :1].mean(axis=-1, keepdims=True))
  y = _convolve((cells - reference).reshape(x.shape).astype(kernel.dtype), kernel, split).astype(jnp.float32)

  sums = kernel.astype(jnp.float32).reshape(channels, split.kernel, split.kernel, -1).sum(axis=0)  # (row, column, out)
  first, rest = slice(stride), slice(stride, None)
  reference = reference[:, :, 0, :, 0]  # (B, H' + 1, W' + 1, 1)
  own = reference[:, :-1, :-1]
  return (
    y
    + (reference[:, :-1, 1:] - own) * _per_channel(sums[first, rest].sum(axis=(0, 1)))
    + (reference[:, 1:, :-1] - own) * _per_channel(sums[rest, first].sum(axis=(0, 1)))
    + (reference[:, 1:, 1:] - own) * _per_channel(sums[rest, rest].sum(axis=(0, 1)))
    - (mean - own) * _per_channel(sums.sum(axis=(0, 1)))
  )


def _pad_to_cells(x: Array, split: Split) -> Array:
  """The zero-padded (B, H, W, C), cut to H' + 1 by W' + 1 cells of stride x stride: what patches see, and a bit."""
  sides = (
    (split.padding, (split.output_size(size) + 1) * split.stride - split.padding - size, 0) for size in x.shape[1:3]
  )
  return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])


def _centred(x: Array) -> Array:
  """Subtracts the mean over the last axis, in float32: for a LayerNorm over patches, which it does not change.

  Where the image is constant a patch has no variance and LayerNorm multiplies what its own mean left
  by rounding with epsilon ** -0.5 = 316: enough to move logits by 7e-5. A second mean over
  values that are already centred leaves nothing.
  """
  x = x.astype(jnp.float32)
  return x - x.mean(axis=-1, keepdims=True)


def _per_channel(x: Array) -> Array:
  return x.reshape(1, 1, 1, -1)


def _convolve(x: Array, kernel: Array, split: Split) -> Array:
  """Products of each patch of the padded (B, H, W, C) with a kernel (C * kernel * kernel, out)."""
  kernel = kernel.reshape(x.shape[-1], split.kernel, split.kernel, -1).astype(x.dtype)
  return lax.conv_general_dilated(
    x, kernel, (split.stride, split.stride), 'VALID', dimension_numbers=('NHWC', 'IHWO', 'NHWC')
  )


def _window_moments(x: Array, split: Split) -> tuple[Array, Array]:
  """Mean and variance of each patch of the padded (B, H, W, C), both (B, H', W', 1).

  Reduced axis by axis. Windows hold equally many values, so that the mean of their union is the mean
  of their means, and its variance the mean of their variances plus the variance of their means:
  squares of differences throughout, no small difference of large squares.
  """
  mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
  for axis in (1, 2):
    means, variances = (_windows(moment, split, axis) for moment in (mean, variance))
    mean = sum(means[1:], means[0]) / split.kernel
    squares = [v + (m - mean) ** 2 for m, v in zip(means, variances, strict=True)]
    variance = sum(squares[1:], squares[0]) / split.kernel
  return mean, variance


def _windows(x: Array, split: Split, axis: int) -> list[Array]:
  """The first, second, ... element along `axis` of all windows of cells' (B, H, W, 1)."""
  last = x.shape[axis] - 2 * split.stride
  return [lax.slice_in_dim(x, i, last + i + 1, split.stride, axis) for i in range(split.kernel)]
