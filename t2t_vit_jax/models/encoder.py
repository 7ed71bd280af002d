"""The encoder's standard block: pre-norm attention and MLP. `block_variants` has the paper's others."""

import functools
from typing import Any, ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.attention import AttentionForm, attention_weights, cudnn_attention, takes_cudnn, weighted_sum
from t2t_vit_jax.models.layers import Dense, DenseParameters, Dtype, LayerNorm, Mlp, StochasticDepth
from t2t_vit_jax.models.products import direct, einsum

Array = jax.Array


@jax.custom_jvp
def project_to_heads(x: Array, kernel: Array) -> list[Array]:
  """Projects x by kernels stored as one: (B, T, D), (D, parts, heads, width) -> `parts` arrays (B, T, heads, width).

    y_i = x @ kernel_i
    dx  = sum_i dy_i @ kernel_i.T  =  concat(dy) @ concat(kernel).T
    dkernel_i = x.T @ dy_i,    all i in one product: x.T @ concat(dy)

  The forward pass computes the projections one by one: a joint product costs less, but cutting up its result costs more
  than that saves. The products of the backward pass are joint, since nothing has to be cut up there. The rule below
  computes the tangent as one product; its transpose is the backward pass.
  """
  return [einsum('btd,dhe->bthe', x, kernel[:, i]) for i in range(kernel.shape[1])]


@project_to_heads.defjvp
def _derivative_of_projections(
  primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[list[Array], list[Array]]:
  (x, kernel), (dx, dkernel) = primals, tangents
  dim, parts, *heads = kernel.shape
  product = functools.partial(einsum, 'btd,de->bte')
  joint = product(dx, kernel.reshape(dim, -1)) + product(x, direct(dkernel.reshape(dim, -1)))
  return project_to_heads(x, kernel), [y.reshape(*y.shape[:-1], *heads) for y in jnp.split(joint, parts, axis=-1)]


class Attention(nn.Module):
  """Multi-head softmax attention: (B, T, D) -> (B, T, D).

  `qk_scale` multiplies the scores; None stands for head_width ** -0.5. The attention weights, (B, num_heads, T, T), are
  sown as `attention`. `num_outputs` limits the result to that many first tokens, which still attend to all.
  `form` 'cudnn' computes without forming the weights, where nobody asks for them; see `cudnn_attention`.
  """

  num_heads: int
  qkv_bias: bool = False
  qk_scale: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  form: AttentionForm = 'auto'
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False, num_outputs: int | None = None) -> Array:
    dim = x.shape[-1]
    if self.num_heads < 1 or dim % self.num_heads:
      raise UserError(f'num_heads must divide {dim}, the width of {self.path[-2]}, and is {self.num_heads}')
    scale = (dim // self.num_heads) ** -0.5 if self.qk_scale is None else self.qk_scale

    q, k, v = self.scaled_qkv(x, scale, num_outputs)  # (B, T, num_heads, head_width)
    # Nobody looks at the weights, and no weight is dropped. For few queries the kernel has no worth.
    unseen = not self.is_mutable_collection('intermediates') and not (train and self.attention_dropout_rate)
    if self.form == 'cudnn' and unseen and q.shape == k.shape and takes_cudnn(q):
      y = cudnn_attention(q, k, v)
    else:
      weights = attention_weights(q, k)
      self.sow('intermediates', 'attention', weights)
      y = weighted_sum(nn.Dropout(self.attention_dropout_rate, deterministic=not train)(weights), v)
    y = self.output(y.reshape(*q.shape[:2], dim))[:, :num_outputs]  # a variant may need the others up to here
    return nn.Dropout(self.dropout_rate, deterministic=not train)(y)

  def scaled_qkv(self, x: Array, scale: float, num_queries: int | None) -> list[Array]:
    """Queries of the first tokens times `scale`, keys and values of all: (B, T, num_heads, head_width)."""
    dim = x.shape[-1]
    heads = (self.num_heads, dim // self.num_heads)
    # Scaling the weights saves a pass over the queries and one over their gradients.
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

  def output(self, y: Array) -> Array:
    """Projection of the heads' results, put side by side: (B, T, D) -> (B, T, D)."""
    return Dense(y.shape[-1], dtype=self.dtype, name='proj')(y)


class EncoderBlock(nn.Module):
  """x + attention(norm x), then x + mlp(norm x): (B, T, D) -> (B, T, D).

  `num_outputs` limits the result to that many first tokens, whose values stay the same.
  """

  num_heads: int
  mlp_ratio: float
  qkv_bias: bool = False
  qk_scale: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth_rate: float | Array = 0.0
  norm_layer: Any = LayerNorm
  attention_form: AttentionForm = 'auto'
  dtype: Dtype = jnp.float32

  attention_class: ClassVar[type[Attention]] = Attention
  grows: ClassVar[bool] = False  # whether the result is wider than the input

  @classmethod
  def check_widths(cls, embed_dim: int, mlp_ratio: float) -> None:
    """Raises UserError if blocks of this kind cannot have these widths."""

  @nn.compact
  def __call__(self, inputs: Array, train: bool = False, num_outputs: int | None = None) -> Array:
    attention = self.attention_class(
      self.num_heads,
      qkv_bias=self.qkv_bias,
      qk_scale=self.qk_scale,
      dropout_rate=self.dropout_rate,
      attention_dropout_rate=self.attention_dropout_rate,
      form=self.attention_form,
      dtype=self.dtype,
      name='attn',
    )
    mlp = self.mlp(inputs.shape[-1])
    stochastic_depth = StochasticDepth(self.stochastic_depth_rate)

    y = attention(self.norm_layer(dtype=self.dtype, name='norm1')(inputs), train=train, num_outputs=num_outputs)
    inputs = inputs[:, :num_outputs]
    x = inputs + stochastic_depth(y, train=train)
    y = mlp(self.norm_layer(dtype=self.dtype, name='norm2')(x), train=train)
    return self.result(inputs, x + stochastic_depth(y, train=train))

  def result(self, inputs: Array, x: Array) -> Array:
    """Result of the block, from its inputs and from what attention and MLP made of them, both (B, T, D)."""
    del inputs
    return x

  def mlp(self, dim: int) -> nn.Module:
    """The block's MLP for tokens of width `dim`, named `mlp`."""
    return Mlp(int(dim * self.mlp_ratio), dim, dropout_rate=self.dropout_rate, dtype=self.dtype, name='mlp')
