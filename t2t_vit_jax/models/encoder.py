"""The encoder block: pre-norm multi-head attention and MLP, each with a stochastic-depth residual."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from t2t_vit_jax.models.layers import Dense, Dtype, LayerNorm, Mlp, StochasticDepth

Array = jax.Array


class Attention(nn.Module):
  """Multi-head softmax attention: (B, T, D) -> (B, T, D).

  `qk_scale` multiplies the scores; None stands for head_width ** -0.5.
  """

  num_heads: int
  qkv_bias: bool = False
  qk_scale: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    batch, num_tokens, dim = x.shape
    head_dim = dim // self.num_heads
    scale = head_dim**-0.5 if self.qk_scale is None else self.qk_scale

    qkv = Dense(3 * dim, use_bias=self.qkv_bias, dtype=self.dtype, name='qkv')(x)
    qkv = qkv.reshape(batch, num_tokens, 3, self.num_heads, head_dim)
    q, k, v = (qkv[:, :, i] for i in range(3))  # each (B, T, heads, head_dim)
    weights = nn.softmax(jnp.einsum('bthd,bshd->bhts', q * scale, k), axis=-1)
    weights = nn.Dropout(self.attention_dropout_rate, deterministic=not train)(weights)
    y = jnp.einsum('bhts,bshd->bthd', weights, v).reshape(batch, num_tokens, dim)
    y = Dense(dim, dtype=self.dtype, name='proj')(y)
    return nn.Dropout(self.dropout_rate, deterministic=not train)(y)


class EncoderBlock(nn.Module):
  """x + attention(norm x), then x + mlp(norm x): (B, T, D) -> (B, T, D)."""

  num_heads: int
  mlp_ratio: float
  qkv_bias: bool = False
  qk_scale: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  stochastic_depth_rate: float = 0.0
  norm_layer: Any = LayerNorm
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool = False) -> Array:
    dim = x.shape[-1]
    attention = Attention(
      self.num_heads,
      qkv_bias=self.qkv_bias,
      qk_scale=self.qk_scale,
      dropout_rate=self.dropout_rate,
      attention_dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      name='attn',
    )
    mlp = Mlp(int(dim * self.mlp_ratio), dim, dropout_rate=self.dropout_rate, dtype=self.dtype, name='mlp')
    stochastic_depth = StochasticDepth(self.stochastic_depth_rate)

    y = attention(self.norm_layer(dtype=self.dtype, name='norm1')(x), train=train)
    x = x + stochastic_depth(y, train=train)
    y = mlp(self.norm_layer(dtype=self.dtype, name='norm2')(x), train=train)
    return x + stochastic_depth(y, train=train)
