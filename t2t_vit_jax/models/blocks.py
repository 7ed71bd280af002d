"""Runs an encoder's blocks: one by one, recomputed in the backward pass, or as a loop over stacked arrays."""

from collections.abc import Callable
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
# Of `jax.checkpoint_policies`, for one block: what it saves for its backward pass; the rest is computed again.
RematPolicy = Literal['none', 'nothing_saveable', 'dots_saveable', 'dots_with_no_batch_dims_saveable']

STACK = 'blocks'  # of stacked blocks; the last block keeps its own name, whose number gives the depth


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


def rematerialised(block_class: type[nn.Module], remat: RematPolicy) -> Any:
  """The class of blocks that save what `remat` names, called with (x, train, num_outputs); as it is with 'none'."""
  if remat == 'none':
    return block_class
  return nn.remat(block_class, policy=getattr(jax.checkpoint_policies, remat), static_argnums=(2, 3))


def run_as_loop(
  x: Array,
  make_block: Callable[[float | Array], nn.Module],
  params: Any,
  *,
  train: bool,
  rates: Array | None,
  keys: Array | None,
  remat: RematPolicy,
) -> Array:
  """Runs N blocks of one shape after each other: (B, T, D) -> (B, T, D). The program is that of one block.

  Args:
    x: what the first block gets.
    make_block: from a stochastic depth rate to a block without a parent.
    params: of all blocks, stacked: arrays (N, ...).
    train: whether to drop.
    rates: of stochastic depth, (N,); None for none.
    keys: of the blocks' random draws, (N,); None where there are none.
    remat: what a block saves for its backward pass.
  """

  def body(x: Array, block: tuple[Any, Array | None, Array | None]) -> tuple[Any, None]:
    params, rate, key = block
    module = make_block(0.0 if rate is None else rate)
    return module.apply({'params': params}, x, train, rngs={} if key is None else {'dropout': key}), None

  if remat != 'none':
    # XLA can't merge computations across the iterations of a loop: nothing has to prevent it.
    body = jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, remat), prevent_cse=False)
  return jax.lax.scan(body, x, (params, rates, keys))[0]
