"""Turns pixels into the numbers that a model takes."""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Normalization:
  """Scales images (B, H, W, 3) of values from 0 to 255 to [0, 1], then subtracts `mean` and divides by `std`."""

  mean: tuple[float, float, float]  # of RGB in [0, 1]
  std: tuple[float, float, float]

  def __call__(self, images: Array) -> Array:
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (self.mean, self.std))
    return (images.astype(jnp.float32) / 255 - mean) / std
