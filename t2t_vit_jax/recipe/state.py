"""Everything that a run changes from step to step."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from t2t_vit_jax.models.blocks import stack_blocks
from t2t_vit_jax.models.t2t_vit import T2TViT

Array = jax.Array
Tree = Any


class TrainState(struct.PyTreeNode):
  """The state of a run, saved, restored and passed from step to step as one unit."""

  step: Array  # () int32, optimizer steps done
  params: Tree  # with `scan_blocks` the blocks are stacked, in `ema` and `opt_state` too: see `stack_blocks`
  frozen: Tree  # position table and random projections: stored, never trained
  ema: Tree  # moving average of `params`; empty where the run keeps none
  opt_state: optax.OptState

  def variables(self, params: Tree | None = None) -> dict[str, Tree]:
    """Variables for `model.apply`; with `params` (such as `ema`) in place of the raw parameters."""
    return {'params': self.params if params is None else params, 'frozen': self.frozen}


def init_state(
  model: T2TViT,
  optimizer: optax.GradientTransformation,
  rng: Array,
  image_size: int,
  *,
  channels: int = 3,
  with_ema: bool,
  variables: Tree | None = None,
) -> TrainState:
  """A fresh state for square images of `image_size` px; random unless `variables` are given."""
  if variables is None:
    variables = model.init(rng, jnp.zeros((1, image_size, image_size, channels)))
  # Stacked before the optimizer sees them: its programs too then have few arrays.
  params = stack_blocks(variables['params']) if model.scan_blocks else variables['params']
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    frozen=variables.get('frozen', {}),
    # A copy: the step donates its buffers, and one buffer cannot be given away twice.
    ema=jax.tree.map(jnp.copy, params) if with_ema else {},
    opt_state=optimizer.init(params),
  )
