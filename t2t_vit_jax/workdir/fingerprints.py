"""Checksums of a state (fingerprints) and of what is said of it: reading alone does not notice flipped bits."""

import hashlib
import json
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax.recipe.sharding import mesh_of, replicated


def fingerprints(state: dict[str, Any]) -> dict[str, jax.Array]:
  """Checksums by the name of a state's part, for each part with arrays."""
  return {name: fingerprint(part) for name, part in state.items() if jax.tree.leaves(part)}


def abstract_fingerprints(state: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Describes the fingerprints of a state that is only described: shapes, dtypes and shardings."""
  sharding, shapes = replicated(mesh_of(state)), jax.eval_shape(fingerprints, state)
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in shapes.items()}


def verified(restored: dict[str, Any]) -> dict[str, Any]:
  """The state `restored` without its checksums.

  Raises:
    ValueError: the arrays have other checksums.
  """
  saved = restored.pop('fingerprint')
  computed = fingerprints(restored)
  if not all(np.array_equal(saved[name], computed[name]) for name in computed):
    raise ValueError('its numbers do not match their checksums')
  return restored


def sealed(values: dict[str, Any], state: dict[str, Any] | None = None) -> dict[str, Any]:
  """JSON with a checksum of it, and of the names, shapes and dtypes in `state`."""
  return {**values, 'checksum': _digest(values, state)}


def unsealed(stored: Any, state: dict[str, Any] | None = None) -> dict[str, Any]:
  """The JSON that `sealed` got. What older versions wrote has no checksum and passes.

  Raises:
    ValueError: the JSON or the state has changed.
  """
  if not isinstance(stored, dict) or not stored:
    raise ValueError('its description is missing')
  values = {name: value for name, value in stored.items() if name != 'checksum'}
  if stored.get('checksum', _digest(values, state)) != _digest(values, state):
    raise ValueError('its description does not match its checksum')
  return values


def _digest(values: dict[str, Any], state: dict[str, Any] | None) -> str:
  arrays = traverse_util.flatten_dict(state or {}, sep='/')
  shapes = {name: (*array.shape, str(array.dtype)) for name, array in arrays.items()}
  return hashlib.sha256(json.dumps([values, shapes], sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
  """Checksums (number of arrays,) uint32, one for each array of `tree`.

  A checksum is the sum of the array's bits as 32-bit numbers times odd weights, modulo 2**32. No order of summation
  changes it, so it is the same however the array is divided among devices.
  """
  return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _checksum(x: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
