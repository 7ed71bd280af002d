"""The fixed table of positions that is added to the tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def sinusoidal_position_embedding(num_positions: int, dim: int) -> np.ndarray:
  """The fixed table of shape (1, num_positions, dim); row 0 belongs to the cls token.

  table[p, 2i] = sin(p / 10000^(2i/dim)) and table[p, 2i+1] = cos of the same angle. The angles are computed in float64:
  in float32 the large ones are off by 1e-5.
  """
  exponent = 2 * (np.arange(dim) // 2) / dim
  angle = np.arange(num_positions)[:, None] / np.power(10000.0, exponent)
  table = np.where(np.arange(dim) % 2 == 0, np.sin(angle), np.cos(angle))
  return table[None].astype(np.float32)


def resize_position_embedding(table: Array, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Array:
  """Resizes the grid rows of a position table as the reference does when it loads a checkpoint.

  Bicubic in PyTorch's convention (a = -0.75, align_corners=False, no anti-aliasing); row 0, the cls token's, is kept.

  Args:
    table: (1, 1 + H * W, D).
    old_grid: (H, W) of `table`.
    new_grid: (H', W') wanted.

  Returns:
    (1, 1 + H' * W', D).
  """
  if old_grid == new_grid:
    return table
  cls_row, rows = table[:, :1], table[:, 1:]
  dim = table.shape[-1]
  # In float32 and at full precision on every backend: positions are small differences of large terms.
  resized = jax.image.resize(
    rows.reshape(1, *old_grid, dim).astype(jnp.float32),
    (1, *new_grid, dim),
    jax.image.ResizeMethod.CUBIC_PYTORCH,
    antialias=False,
    precision=jax.lax.Precision.HIGHEST,
  )
  return jnp.concatenate([cls_row, resized.reshape(1, math.prod(new_grid), dim).astype(table.dtype)], axis=1)
