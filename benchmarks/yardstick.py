"""A plain ViT in Flax's own layers: what a T2T-ViT of its size is compared with.

Architecture: Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929); the small variant, S/16: Touvron et al., ICML 2021
(arXiv 2012.12877). With the class token and a learned position table, no dropout, and GELU in its tanh form.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class ViT(nn.Module):
  """(B, H, W, 3) -> logits (B, num_classes). The defaults are S/16."""

  num_classes: int = 1000
  patch_size: int = 16
  embed_dim: int = 384
  depth: int = 12
  num_heads: int = 6
  mlp_ratio: float = 4.0
  dtype: Any = jnp.float32
  image_size: int = 224  # px; a run asks for it and for the next
  scan_blocks: bool = False

  @nn.compact
  def __call__(self, images: Array, *, train: bool = False) -> Array:
    del train  # nothing is dropped
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(self.embed_dim, patch, patch, padding='VALID', dtype=self.dtype, name='embedding')(images)
    x = x.reshape(x.shape[0], -1, self.embed_dim)
    cls = self.param('cls', nn.initializers.zeros, (1, 1, self.embed_dim), jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.embed_dim)).astype(x.dtype), x], axis=1)
    position = self.param('pos_embed', nn.initializers.normal(0.02), (1, x.shape[1], self.embed_dim), jnp.float32)
    x = x + position.astype(x.dtype)
    for number in range(self.depth):
      x = Block(self.num_heads, self.mlp_ratio, self.dtype, name=f'blocks_{number}')(x)
    cls_features = nn.LayerNorm(dtype=self.dtype, name='norm')(x)[:, 0]
    return nn.Dense(self.num_classes, name='head')(cls_features.astype(jnp.float32))


class Block(nn.Module):
  """x + attention(norm x), then x + mlp(norm x): (B, T, D) -> (B, T, D)."""

  num_heads: int
  mlp_ratio: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dim = x.shape[-1]
    y = nn.LayerNorm(dtype=self.dtype, name='norm1')(x)
    x = x + nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name='attn')(y)
    y = nn.LayerNorm(dtype=self.dtype, name='norm2')(x)
    y = nn.gelu(nn.Dense(int(dim * self.mlp_ratio), dtype=self.dtype, name='fc1')(y))
    return x + nn.Dense(dim, dtype=self.dtype, name='fc2')(y)
