"""What happens to a batch of uint8 images and labels on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
  """Scales uint8 (B, H, W, 3) to [0, 1], subtracts `mean` and divides by `std` per channel: float32."""
  return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def soft_targets(labels: Array, num_classes: int, label_smoothing: float) -> Array:
  """Labels (B,) as distributions (B, K): 1 - s + s/K for the class, s/K for the others."""
  return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)
