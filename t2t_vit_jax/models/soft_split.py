"""The soft split: overlapping patches, T2T-ViT's way from an image (or a token grid) to fewer, wider tokens."""

from typing import NamedTuple

import jax
from jax import lax

from t2t_vit_jax.errors import UserError

Array = jax.Array


class Split(NamedTuple):
  """Geometry of one soft split, in pixels (or tokens) of its input, the same along both axes."""

  kernel: int
  stride: int
  padding: int

  def output_size(self, size: int) -> int:
    """Number of patches along an axis of length `size`: 0 or less if it is too short for one."""
    return (size + 2 * self.padding - self.kernel) // self.stride + 1


# The paper's three splits: 224 px -> 56 x 56 -> 28 x 28 -> 14 x 14 tokens.
SPLITS = (Split(7, 4, 2), Split(3, 2, 1), Split(3, 2, 1))


def token_grid(image_size: tuple[int, int]) -> tuple[int, int]:
  """(H, W) of the token grid that the three splits make of an image of (height, width) pixels.

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
