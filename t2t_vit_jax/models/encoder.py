"""The encoder's layers: pre-norm attention and MLP blocks, and the paper's variants of them.

The variants come from the paper's transfer of CNN designs (section 3.2): squeeze-and-excitation in
the attention, "ghost" layers that derive half of a layer's output from the other half, and a
DenseNet-like encoder whose blocks add channels. Each is a difference of the standard block, switched
on by an argument.
"""

from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.layers import (
  Dense,
  DenseParameters,
  Dtype,
  LayerNorm,
  Mlp,
  StochasticDepth,
  gelu,
  torch_conv_init,
)

Array = jax.Array
BlockType = Literal['standard', 'se', 'ghost', 'dense']

SQUEEZE_REDUCTION = 16  # of the squeeze-and-excitation gate's hidden width


class SqueezeExcitation(nn.Module):
  """Scales each channel of (B, T, D) by a gate in (0, 1) that the mean over the tokens decides."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dim = x.shape[-1]
    gate = x.mean(axis=1, keepdims=True)  # (B, 1, D)
    gate = nn.relu(Dense(dim // SQUEEZE_REDUCTION, use_bias=False, dtype=self.dtype, name='fc1')(gate))
    return x * nn.sigmoid(Dense(dim, use_bias=False, dtype=self.dtype, name='fc2')(gate))


class CheapOperation(nn.Module):
  """A factor per channel of (B, T, C): the depthwise 1x1 convolution of a ghost layer, started like one."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param('kernel', torch_conv_init(fan_in=1), (1, 1, x.shape[-1]), jnp.float32)
    return x * kernel.astype(self.dtype)


class GhostMlp(nn.Module):
  """An MLP of hidden width 3 D, of which one third is computed and two are cheap copies: (B, T, D) -> (B, T, D)."""

  dropout_rate: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    dim = x.shape[-1]
    x1 = gelu(Dense(dim, dtype=self.dtype, name='fc1')(x))
    x2 = gelu(CheapOperation(dtype=self.dtype, name='cheap_operation2')(x1))
    x3 = gelu(CheapOperation(dtype=self.dtype, name='cheap_operation3')(x1))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(jnp.concatenate([x1, x2, x3], axis=-1))
    x = Dense(dim, dtype=self.dtype, name='fc2')(x)
    return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


@jax.custom_jvp
def project_to_heads(x: Array, kernel: Array) -> list[Array]:
  """Projections of x stored as one: (B, T, D), (D, parts, heads, width) -> `parts` arrays (B, T, heads, width).

  They are computed one by one, as a joint product costs less, but cutting up its result costs more than that. Gradients
  are joint products: there nothing is cut up. What decides it is the derivative, whose transpose they are.
  """
  return [jnp.einsum('btd,dhe->bthe', x, kernel[:, i]) for i in range(kernel.shape[1])]


@project_to_heads.defjvp
def _derivative_of_projections(
  primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[list[Array], list[Array]]:
  (x, kernel), (dx, dkernel) = primals, tangents
  dim, parts, *heads = kernel.shape
  joint = dx @ kernel.reshape(dim, -1) + x @ dkernel.reshape(dim, -1)
  return project_to_heads(x, kernel), [y.reshape(*y.shape[:-1], *heads) for y in jnp.split(joint, parts, axis=-1)]


class Attention(nn.Module):
  """Multi-head softmax attention: (B, T, D) -> (B, T, D).

  `qk_scale` multiplies the scores; None stands for head_width ** -0.5. With `block_type` 'se' the
  output is gated by `SqueezeExcitation`; with 'ghost' each projection computes D/2 channels and
  derives the others from them. Its weights, (B, num_heads, T, T), are sown as `attention`.
  `num_outputs` stops after the results of so many tokens, which still attend to all: 'se' needs all.
  """

  num_heads: int
  block_type: BlockType = 'standard'
  qkv_bias: bool = False
  qk_scale: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False, num_outputs: int | None = None) -> Array:
    dim = x.shape[-1]
    if dim % self.num_heads:
      raise UserError(f'{self.num_heads} heads (num_heads) do not divide the width {dim} of {self.path[-2]}')
    scale = (dim // self.num_heads) ** -0.5 if self.qk_scale is None else self.qk_scale

    q, k, v = self._scaled_qkv(x, scale, num_outputs)
    weights = nn.softmax(jnp.einsum('bthd,bshd->bhts', q, k), axis=-1)
    self.sow('intermediates', 'attention', weights)
    weights = nn.Dropout(self.attention_dropout_rate, deterministic=not train)(weights)
    y = jnp.einsum('bhts,bshd->bthd', weights, v).reshape(*q.shape[:2], dim)
    y = Dense(dim, dtype=self.dtype, name='proj')(y)
    if self.block_type == 'se':
      y = SqueezeExcitation(dtype=self.dtype, name='se')(y)
    return nn.Dropout(self.dropout_rate, deterministic=not train)(y)

  def _scaled_qkv(self, x: Array, scale: float, num_queries: int | None) -> list[Array]:
    """Queries of the first tokens times `scale`, keys and values of all: (B, T, num_heads, head_width)."""
    dim = x.shape[-1]
    heads = (self.num_heads, dim // self.num_heads)
    if self.block_type == 'ghost':
      of_parts = [(x[:, :num_queries], 'q'), (x, 'k'), (x, 'v')]
      q, k, v = (self._ghost_projection(y, name).reshape(*y.shape[:-1], *heads) for y, name in of_parts)
      return [q * scale, k, v]
    # The scale goes into the weights, where it costs no pass over the queries and none over their gradients.
    scales = np.array([scale, 1, 1], np.float32)
    dense = DenseParameters(dim, 3 * dim, self.qkv_bias, name='qkv')()
    kernel = (dense['kernel'].reshape(dim, 3, *heads) * scales.reshape(1, 3, 1, 1)).astype(self.dtype)
    if num_queries is None:
      projected = project_to_heads(x, kernel)
    else:
      projected = project_to_heads(x[:, :num_queries], kernel[:, :1]) + project_to_heads(x, kernel[:, 1:])
    if self.qkv_bias:
      biases = (dense['bias'].reshape(3, 1, 1, *heads) * scales.reshape(3, 1, 1, 1, 1)).astype(self.dtype)
      projected = [y + bias for y, bias in zip(projected, biases, strict=True)]
    return projected

  def _ghost_projection(self, x: Array, name: str) -> Array:
    y = Dense(x.shape[-1] // 2, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(x)
    return jnp.concatenate([y, CheapOperation(dtype=self.dtype, name=f'cheap_operation_{name}')(y)], axis=-1)


class Transition(nn.Module):
  """Halves the channels between two stages of the dense encoder: (B, T, D) -> (B, T, D // 2)."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool = False, num_outputs: None = None) -> Array:
    del train, num_outputs  # called like a block
    return gelu(Dense(x.shape[-1] // 2, dtype=self.dtype, name='linear')(x)).astype(x.dtype)


class EncoderBlock(nn.Module):
  """x + attention(norm x), then x + mlp(norm x): (B, T, D) -> (B, T, D).

  With `block_type` 'dense' the result is narrowed to `growth_rate` channels and appended to the
  block's input: (B, T, D) -> (B, T, D + growth_rate).

  With `num_outputs` only the first so many tokens of the result are computed, with the same values.
  """

  num_heads: int
  mlp_ratio: float
  block_type: BlockType = 'standard'
  growth_rate: int = 64
  qkv_bias: bool = False
  qk_scale: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth_rate: float | Array = 0.0
  norm_layer: Any = LayerNorm
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, inputs: Array, train: bool = False, num_outputs: int | None = None) -> Array:
    dim = inputs.shape[-1]
    attention = Attention(
      self.num_heads,
      block_type=self.block_type,
      qkv_bias=self.qkv_bias,
      qk_scale=self.qk_scale,
      dropout_rate=self.dropout_rate,
      attention_dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      name='attn',
    )
    mlp: nn.Module
    if self.block_type == 'ghost':
      mlp = GhostMlp(dropout_rate=self.dropout_rate, dtype=self.dtype, name='mlp')
    else:
      mlp = Mlp(int(dim * self.mlp_ratio), dim, dropout_rate=self.dropout_rate, dtype=self.dtype, name='mlp')
    stochastic_depth = StochasticDepth(self.stochastic_depth_rate)

    y = attention(self.norm_layer(dtype=self.dtype, name='norm1')(inputs), train=train, num_outputs=num_outputs)
    inputs = inputs[:, :num_outputs]
    x = inputs + stochastic_depth(y, train=train)
    y = mlp(self.norm_layer(dtype=self.dtype, name='norm2')(x), train=train)
    x = x + stochastic_depth(y, train=train)
    if self.block_type == 'dense':
      return jnp.concatenate([inputs, Dense(self.growth_rate, dtype=self.dtype, name='dense_linear')(x)], axis=-1)
    return x
