"""Turns pixels into the numbers that a model takes."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Normalization:
  """Scales images (B, H, W, C) of values from 0 to 255 to [0, 1], then subtracts `mean` and divides by `std`."""

  mean: tuple[float, ...]  # of each channel, in [0, 1]
  std: tuple[float, ...]

  def __call__(self, images: Array) -> Array:
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
  """The mean or std of images of `channels` channels; for grey ones the average of that of RGB, as timm does it."""
  return tuple(values) if channels != 1 else (sum(values) / len(values),)
