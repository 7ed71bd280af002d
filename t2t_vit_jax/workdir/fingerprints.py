"""Checksums of a state, saved beside it: reading alone does not notice flipped bits."""

from typing import Any

import jax
import jax.numpy as jnp

from t2t_vit_jax.recipe.sharding import mesh_of, replicated


def fingerprints(state: dict[str, Any]) -> dict[str, jax.Array]:
  """The checksums of each part of a state that has any arrays."""
  return {name: fingerprint(part) for name, part in state.items() if jax.tree.leaves(part)}


def abstract_fingerprints(state: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of `fingerprints`, from those of a state."""
  where, shapes = replicated(mesh_of(state)), jax.eval_shape(fingerprints, state)
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for name, x in shapes.items()}


def verified(restored: dict[str, Any]) -> dict[str, Any]:
  """A state as it was read, without its checksums.

  Raises:
    ValueError: they are not those of the arrays.
  """
  saved = restored.pop('fingerprint')
  found = fingerprints(restored)
  if any((saved[name] != found[name]).any() for name in found):
    raise ValueError('its numbers are not those that were saved')
  return restored


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
  """A checksum for each array of `tree`, (number of arrays,) uint32: reading alone does not notice flipped bits.

  The sum of the array's bits as 32-bit numbers times odd weights, modulo 2**32, which no order of summation
  changes: it is the same however the array is divided among devices.
  """
  return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _checksum(x: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
