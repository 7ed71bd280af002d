"""Other blocks for the encoder, from the paper's transfer of CNN designs (section 3.2).

Squeeze-and-excitation in the attention, "ghost" layers that derive a part of a layer's output from the other part, and
the DenseNet-like encoder, whose blocks add channels. Each is a difference of the standard block; `BLOCK_TYPES` names
them.
"""

from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.encoder import Attention, EncoderBlock
from t2t_vit_jax.models.layers import Dense, Dtype, gelu, torch_conv_init

Array = jax.Array

SQUEEZE_REDUCTION = 16  # the gate of squeeze-and-excitation has hidden width D // 16


class SqueezeExcitation(nn.Module):
  """Scales each channel of (B, T, D) by a gate in (0, 1) that is computed from the mean over the tokens."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dim = x.shape[-1]
    gate = x.mean(axis=1, keepdims=True)  # (B, 1, D)
    gate = nn.relu(Dense(dim // SQUEEZE_REDUCTION, use_bias=False, dtype=self.dtype, name='fc1')(gate))
    return x * nn.sigmoid(Dense(dim, use_bias=False, dtype=self.dtype, name='fc2')(gate))


class SqueezeExcitationAttention(Attention):
  """Attention whose output is gated by `SqueezeExcitation`, which needs all tokens."""

  def scaled_qkv(self, x: Array, scale: float, num_queries: int | None) -> list[Array]:
    del num_queries
    return super().scaled_qkv(x, scale, None)

  def output(self, y: Array) -> Array:
    return SqueezeExcitation(dtype=self.dtype, name='se')(super().output(y))


class SqueezeExcitationBlock(EncoderBlock):
  """The standard block with a gate for each channel in its attention."""

  attention_class = SqueezeExcitationAttention


class CheapOperation(nn.Module):
  """A factor for each channel of (B, T, C): the depthwise 1x1 convolution of a ghost layer, initialised like one."""

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


class GhostAttention(Attention):
  """Attention whose projections compute D/2 channels each and derive the others from them."""

  def scaled_qkv(self, x: Array, scale: float, num_queries: int | None) -> list[Array]:
    heads = (self.num_heads, x.shape[-1] // self.num_heads)
    inputs = [(x[:, :num_queries], 'q'), (x, 'k'), (x, 'v')]
    q, k, v = (self._projection(y, name).reshape(*y.shape[:-1], *heads) for y, name in inputs)
    return [q * scale, k, v]

  def _projection(self, x: Array, name: str) -> Array:
    y = Dense(x.shape[-1] // 2, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(x)
    return jnp.concatenate([y, CheapOperation(dtype=self.dtype, name=f'cheap_operation_{name}')(y)], axis=-1)


class GhostBlock(EncoderBlock):
  """The standard block with ghost layers in attention and MLP."""

  attention_class = GhostAttention

  @classmethod
  def check_widths(cls, embed_dim: int, mlp_ratio: float) -> None:
    if mlp_ratio != 3 or embed_dim % 2:
      raise UserError(f'ghost blocks need mlp_ratio 3 and an even embed_dim, not {mlp_ratio} and {embed_dim}')

  def mlp(self, dim: int) -> nn.Module:
    del dim  # GhostMlp reads it from its input
    return GhostMlp(dropout_rate=self.dropout_rate, dtype=self.dtype, name='mlp')


class DenseBlock(EncoderBlock):
  """The standard block, whose result is narrowed and appended to its input: (B, T, D) -> (B, T, D + growth_rate)."""

  growth_rate: int = 64

  grows = True

  def result(self, inputs: Array, x: Array) -> Array:
    added = Dense(self.growth_rate, dtype=self.dtype, name='dense_linear')(x)
    return jnp.concatenate([inputs, added], axis=-1)


class Transition(nn.Module):
  """Halves the channels between two stages of the dense encoder: (B, T, D) -> (B, T, D // 2)."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool = False, num_outputs: None = None) -> Array:
    del train, num_outputs  # called like a block
    return gelu(Dense(x.shape[-1] // 2, dtype=self.dtype, name='linear')(x)).astype(x.dtype)


class BlockType(NamedTuple):
  """A row of `BLOCK_TYPES`.

  Attributes:
    block: the class.
    fields: the class's own fields -> the fields of `T2TViT` that fill them.
  """

  block: type[EncoderBlock]
  fields: dict[str, str] = {}


# The encoder's blocks, by `block_type`. docs/extending.md shows how to add one.
BLOCK_TYPES = {
  'standard': BlockType(EncoderBlock),
  'se': BlockType(SqueezeExcitationBlock),
  'ghost': BlockType(GhostBlock),
  'dense': BlockType(DenseBlock, {'growth_rate': 'growth_rate'}),
}
