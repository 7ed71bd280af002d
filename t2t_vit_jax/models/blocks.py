"""Runs an encoder's blocks: one by one, recomputed in the backward pass, or as a loop over stacked arrays."""

from collections.abc import Callable
from typing import Any, Literal

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array
# Names in `jax.checkpoint_policies`: what a block saves for its backward pass. It computes the rest again.
RematPolicy = Literal['none', 'nothing_saveable', 'dots_saveable', 'dots_with_no_batch_dims_saveable']

STACK = 'blocks'  # name of the stacked blocks; the last block keeps its own, whose number gives the depth


def stack_blocks(tree: Any) -> Any:
  """Stacks all blocks but the last, `blocks_0`, `blocks_1` and so on, into one tree `blocks`: arrays (depth - 1, ...).

  `T2TViT` with `scan_blocks` takes parameters in both forms, and stacks plain ones at each call. Looking at layers by
  name, in `intermediates` too, needs the plain form.

  Args:
    tree: nested dicts of arrays with blocks of one shape somewhere inside: variables, or a training state. Without
      blocks, or with a single one, it is returned as it is.
  """
  if not isinstance(tree, dict):
    return tree
  depth = sum(name.startswith(f'{STACK}_') for name in tree)
  names = [f'{STACK}_{number}' for number in range(depth - 1)] if STACK not in tree else []
  stacked = {name: stack_blocks(branch) for name, branch in tree.items() if name not in names}
  if names:
    stacked[STACK] = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(tree[name] for name in names))
  return stacked


def unstack_blocks(tree: Any) -> Any:
  """Undoes `stack_blocks`; a tree without a stack is returned as it is."""
  if not isinstance(tree, dict):
    return tree
  unstacked = {name: unstack_blocks(branch) for name, branch in tree.items() if name != STACK}
  if STACK in tree:
    for number in range(len(jax.tree.leaves(tree[STACK])[0])):
      unstacked[f'{STACK}_{number}'] = jax.tree.map(lambda x, number=number: x[number], tree[STACK])
  return unstacked


def rematerialised(block_class: type[nn.Module], remat: RematPolicy) -> Any:
  """Wraps `block_class` so that its blocks save what `remat` names; they are called with (x, train, num_outputs)."""
  if remat == 'none':
    return block_class
  return nn.remat(block_class, policy=getattr(jax.checkpoint_policies, remat), static_argnums=(2, 3))


@jax.custom_jvp
def with_stored_gradient(x: Array) -> Array:
  """Returns x; in programs for a CPU its gradient is written to memory.

  Otherwise XLA:CPU never stores the gradient of a residual stream: it sums the contributions of all later blocks anew
  in each block. It does not look into loops, and removes those that do nothing: this one changes the sign twice.
  """
  return x


@with_stored_gradient.defjvp
def _stored_tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
  def stored(dx: Array) -> Array:
    return lax.fori_loop(0, 2, lambda _, dx: -dx, dx)

  (x,), (dx,) = primals, tangents
  return x, lax.platform_dependent(dx, cpu=stored, default=lambda dx: dx)


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
  """Runs N blocks of one shape after each other: (B, T, D) -> (B, T, D). The compiled program holds one.

  Args:
    x: input of the first block.
    make_block: stochastic depth rate -> block without a parent.
    params: parameters of all blocks, stacked: arrays (N, ...).
    train: whether dropout and stochastic depth drop anything.
    rates: stochastic depth rates, (N,); None for no stochastic depth.
    keys: keys of the blocks' random draws, (N,); None if nothing is drawn.
    remat: what a block saves for its backward pass.
  """

  def body(x: Array, block: tuple[Any, Array | None, Array | None]) -> tuple[Any, None]:
    params, rate, key = block
    module = make_block(0.0 if rate is None else rate)
    return module.apply({'params': params}, x, train, rngs={} if key is None else {'dropout': key}), None

  if remat != 'none':
    # XLA can't merge computations of different iterations of a loop, so nothing has to prevent it.
    body = jax.checkpoint(body, policy=getattr(jax.checkpoint_policies, remat), prevent_cse=False)
  return jax.lax.scan(body, x, (params, rates, keys))[0]
