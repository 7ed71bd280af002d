"""The parameters of an encoder's blocks laid on top of each other, for a model that runs the blocks as a loop."""

from typing import Any

import jax
import jax.numpy as jnp

STACK = 'blocks'  # beside the last block, whose own name tells how many there are


def stack_blocks(tree: Any) -> Any:
  """Makes one tree `blocks` of all blocks but the last, `blocks_0`, `blocks_1` and so on: arrays (depth - 1, ...).

  `T2TViT` with `scan_blocks` takes its parameters in either form and stacks what is not stacked at each call. Layers
  are looked at by name, in `intermediates` too: that needs the plain form.

  Args:
    tree: nested dicts of arrays that have blocks of one shape somewhere inside: variables, or a training state. Others,
      and those with a single block, are returned as they are.
  """
  if not isinstance(tree, dict):
    return tree
  depth = sum(name.startswith(f'{STACK}_') for name in tree)
  names = [f'{STACK}_{number}' for number in range(depth - 1)] if STACK not in tree else []
  rest = {name: stack_blocks(branch) for name, branch in tree.items() if name not in names}
  if names:
    rest[STACK] = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(tree[name] for name in names))
  return rest


def unstack_blocks(tree: Any) -> Any:
  """The inverse of `stack_blocks`; returns what has no stack as it is."""
  if not isinstance(tree, dict):
    return tree
  rest = {name: unstack_blocks(branch) for name, branch in tree.items() if name != STACK}
  if STACK in tree:
    for number in range(len(jax.tree.leaves(tree[STACK])[0])):
      rest[f'{STACK}_{number}'] = jax.tree.map(lambda x, number=number: x[number], tree[STACK])
  return rest
