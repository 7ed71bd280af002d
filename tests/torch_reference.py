"""T2T-ViT in plain PyTorch: what the JAX model is compared with at any size, and timed against.

Written from the paper and from the constants of the published code, for reading beside it: eager
operations and an explicit softmax, no fused attention. Parameters carry the names of the published
checkpoints, so their state dicts load as they are. Arguments are named as `t2t_vit_jax.T2TViT`'s.
Images are (B, C, H, W), normalised.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SPLITS = (dict(kernel_size=7, stride=4, padding=2), *[dict(kernel_size=3, stride=2, padding=1)] * 2)
DENSE_RATES = 12  # the dense model takes its stochastic-depth rates from a linspace of this length


def _named(tokens_type, embed_dim, depth, num_heads, mlp_ratio, **more):
  return dict(
    tokens_type=tokens_type, embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, **more
  )


MODELS = {
  't2t_vit_7': _named('performer', 256, 7, 4, 2),
  't2t_vit_10': _named('performer', 256, 10, 4, 2),
  't2t_vit_12': _named('performer', 256, 12, 4, 2),
  't2t_vit_14': _named('performer', 384, 14, 6, 3),
  't2t_vit_19': _named('performer', 448, 19, 7, 3),
  't2t_vit_24': _named('performer', 512, 24, 8, 3),
  't2t_vit_t_14': _named('transformer', 384, 14, 6, 3),
  't2t_vit_t_19': _named('transformer', 448, 19, 7, 3),
  't2t_vit_t_24': _named('transformer', 512, 24, 8, 3),
  't2t_vit_14_resnext': _named('performer', 384, 14, 32, 3),
  't2t_vit_14_wide': _named('performer', 768, 4, 12, 3),
  't2t_vit_14_se': _named('performer', 384, 14, 6, 3, block_type='se'),
  't2t_vit_16_ghost': _named('performer', 384, 16, 6, 3, block_type='ghost'),
  't2t_vit_dense': dict(
    tokens_type='performer', embed_dim=128, num_heads=8, mlp_ratio=2,
    block_type='dense', dense_stages=(3, 6, 6, 4), growth_rate=64,
  ),
}  # fmt: skip


def create(name_or_arguments, **overrides):
  """Builds a named model, or one from a dict of `T2TViT`'s arguments; `overrides` replace some of them."""
  arguments = MODELS[name_or_arguments] if isinstance(name_or_arguments, str) else name_or_arguments
  return T2TViT(**{**arguments, **overrides})


def drop_samples(branch, rate, training):
  """Stochastic depth: zeroes (B, T, D) for whole samples and divides the others by the keep probability."""
  if not training or not rate:
    return branch
  kept = torch.empty(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(1 - rate)
  return branch * kept / (1 - rate)


class Mlp(nn.Module):
  def __init__(self, dim, hidden_dim, dropout_rate=0.0):
    super().__init__()
    self.fc1 = nn.Linear(dim, hidden_dim)
    self.fc2 = nn.Linear(hidden_dim, dim)
    self.dropout = nn.Dropout(dropout_rate)

  def forward(self, x):
    return self.dropout(self.fc2(self.dropout(functional.gelu(self.fc1(x)))))


class ChannelScale(nn.Module):
  """The ghost blocks' "cheap operation", a depthwise 1x1 convolution on the last axis, without bias."""

  def __init__(self, dim):
    super().__init__()
    self.weight = nn.Parameter(torch.empty(dim, 1, 1).uniform_(-1, 1))

  def forward(self, x):
    return x * self.weight.flatten()


class GhostMlp(nn.Module):
  """A third of the hidden layer is computed, the other two thirds are scaled copies of it."""

  def __init__(self, dim, dropout_rate=0.0):
    super().__init__()
    self.fc1 = nn.Linear(dim, dim)
    self.fc2 = nn.Linear(3 * dim, dim)
    self.cheap_operation2 = ChannelScale(dim)
    self.cheap_operation3 = ChannelScale(dim)
    self.dropout = nn.Dropout(dropout_rate)

  def forward(self, x):
    x = functional.gelu(self.fc1(x))
    hidden = torch.cat(
      [x, functional.gelu(self.cheap_operation2(x)), functional.gelu(self.cheap_operation3(x))], dim=-1
    )
    return self.dropout(self.fc2(self.dropout(hidden)))


class SqueezeExcite(nn.Module):
  """Multiplies channels by gates computed from their mean over the tokens."""

  def __init__(self, dim, reduction=16):
    super().__init__()
    self.fc = nn.Sequential(
      nn.Linear(dim, dim // reduction, bias=False),
      nn.ReLU(),
      nn.Linear(dim // reduction, dim, bias=False),
      nn.Sigmoid(),
    )

  def forward(self, x):
    return x * self.fc(x.mean(dim=1, keepdim=True))


class Attention(nn.Module):
  def __init__(self, dim, num_heads, qkv_bias, qk_scale, dropout_rate, attention_dropout_rate, squeeze_excite):
    super().__init__()
    self.num_heads = num_heads
    self.scale = qk_scale if qk_scale is not None else (dim // num_heads) ** -0.5
    self._make_projections(dim, qkv_bias)
    self.proj = nn.Linear(dim, dim)
    self.se_layer = SqueezeExcite(dim) if squeeze_excite else nn.Identity()
    self.dropout = nn.Dropout(dropout_rate)
    self.attention_dropout = nn.Dropout(attention_dropout_rate)

  def _make_projections(self, dim, bias):
    self.qkv = nn.Linear(dim, 3 * dim, bias=bias)

  def _queries_keys_values(self, x):
    return self.qkv(x).chunk(3, dim=-1)

  def _heads(self, x):
    return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, D) -> (B, heads, T, D / heads)

  def forward(self, x):
    q, k, v = map(self._heads, self._queries_keys_values(x))
    weights = self.attention_dropout((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
    y = (weights @ v).transpose(1, 2).flatten(2)
    return self.dropout(self.se_layer(self.proj(y)))


class GhostAttention(Attention):
  """Half of each query, key and value is computed, the other half is a scaled copy."""

  def _make_projections(self, dim, bias):
    self.q, self.k, self.v = (nn.Linear(dim, dim // 2, bias=bias) for _ in range(3))
    for name in 'qkv':
      self.add_module(f'cheap_operation_{name}', ChannelScale(dim // 2))

  def _queries_keys_values(self, x):
    q, k, v = self.q(x), self.k(x), self.v(x)
    yield torch.cat([q, self.cheap_operation_q(q)], dim=-1)
    yield torch.cat([k, self.cheap_operation_k(k)], dim=-1)
    yield torch.cat([v, self.cheap_operation_v(v)], dim=-1)


class Block(nn.Module):
  """Standard, SE or ghost encoder block, (B, T, D) -> (B, T, D)."""

  def __init__(
    self, dim, num_heads, mlp_ratio, qkv_bias, qk_scale, dropout_rate, attention_dropout_rate, drop_path, block_type
  ):
    super().__init__()
    ghost = block_type == 'ghost'
    self.drop_path = drop_path
    self.norm1 = nn.LayerNorm(dim)
    self.attn = (GhostAttention if ghost else Attention)(
      dim, num_heads, qkv_bias, qk_scale, dropout_rate, attention_dropout_rate, squeeze_excite=block_type == 'se'
    )
    self.norm2 = nn.LayerNorm(dim)
    self.mlp = GhostMlp(dim, dropout_rate) if ghost else Mlp(dim, int(dim * mlp_ratio), dropout_rate)

  def forward(self, x):
    x = x + drop_samples(self.attn(self.norm1(x)), self.drop_path, self.training)
    return x + drop_samples(self.mlp(self.norm2(x)), self.drop_path, self.training)


class DenseBlock(Block):
  """A standard block whose output is narrowed and concatenated to its input: (B, T, D) -> (B, T, D + growth_rate)."""

  def __init__(self, growth_rate, dim, **arguments):
    super().__init__(dim, **arguments)
    self.dense_linear = nn.Linear(dim, growth_rate)

  def forward(self, x):
    return torch.cat([x, self.dense_linear(super().forward(x))], dim=-1)


class Transition(nn.Module):
  """Between two dense stages: half the width."""

  def __init__(self, dim):
    super().__init__()
    self.linear = nn.Linear(dim, dim // 2)

  def forward(self, x):
    return functional.gelu(self.linear(x))


class TokenAttention(nn.Module):
  """One softmax head from `dim` to `token_dim`; scores are scaled by the input width, the residual is the value's."""

  def __init__(self, dim, token_dim):
    super().__init__()
    self.scale = dim**-0.5
    self.qkv = nn.Linear(dim, 3 * token_dim, bias=False)
    self.proj = nn.Linear(token_dim, token_dim)

  def forward(self, x):
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
    return v + self.proj(weights @ v)


class TokenTransformer(nn.Module):
  def __init__(self, dim, token_dim):
    super().__init__()
    self.norm1 = nn.LayerNorm(dim)
    self.attn = TokenAttention(dim, token_dim)
    self.norm2 = nn.LayerNorm(token_dim)
    self.mlp = Mlp(token_dim, token_dim)

  def forward(self, x):
    x = self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
  """Linear attention by positive random features; `w` is drawn once and stays."""

  def __init__(self, dim, token_dim, dropout_rate):
    super().__init__()
    num_random_features = token_dim // 2
    self.norm1 = nn.LayerNorm(dim)
    self.kqv = nn.Linear(dim, 3 * token_dim)
    self.proj = nn.Linear(token_dim, token_dim)
    self.norm2 = nn.LayerNorm(token_dim)
    self.mlp = nn.Sequential(nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim))
    self.dropout = nn.Dropout(dropout_rate)
    rows = nn.init.orthogonal_(torch.empty(num_random_features, token_dim))
    self.w = nn.Parameter(rows * num_random_features**0.5, requires_grad=False)

  def _features(self, x):
    exponent = x @ self.w.T - x.square().sum(dim=-1, keepdim=True) / 2
    return exponent.exp() * len(self.w) ** -0.5  # (B, T, m)

  def forward(self, x):
    k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
    k_features, q_features = self._features(k), self._features(q)
    normaliser = q_features @ k_features.sum(dim=1).unsqueeze(-1)  # (B, T, 1)
    y = q_features @ (k_features.transpose(1, 2) @ v) / (normaliser + 1e-8)
    x = v + self.dropout(self.proj(y))
    return x + self.dropout(self.mlp(self.norm2(x)))


def split_size(side, kernel_size, stride, padding):
  """Number of a split's patches along a side of that many pixels or tokens."""
  return (side + 2 * padding - kernel_size) // stride + 1


class TokensToToken(nn.Module):
  """(B, C, H, W) -> (B, T, embed_dim)."""

  def __init__(self, tokens_type, in_channels, token_dim, embed_dim, performer_dropout_rate):
    super().__init__()
    patch, wider_patch = 49 * in_channels, 9 * token_dim
    self.convolution = tokens_type == 'convolution'
    if self.convolution:
      self.soft_split0 = nn.Conv2d(in_channels, token_dim, **SPLITS[0])
      self.soft_split1 = nn.Conv2d(token_dim, token_dim, **SPLITS[1])
      self.project = nn.Conv2d(token_dim, embed_dim, **SPLITS[2])
      return
    if tokens_type == 'performer':
      self.attention1 = TokenPerformer(patch, token_dim, performer_dropout_rate)
      self.attention2 = TokenPerformer(wider_patch, token_dim, performer_dropout_rate)
    else:
      self.attention1 = TokenTransformer(patch, token_dim)
      self.attention2 = TokenTransformer(wider_patch, token_dim)
    self.project = nn.Linear(wider_patch, embed_dim)

  def forward(self, x):
    if self.convolution:
      return self.project(self.soft_split1(self.soft_split0(x))).flatten(2).transpose(1, 2)
    for split, attention in zip(SPLITS, (self.attention1, self.attention2), strict=False):
      grid = [split_size(side, **split) for side in x.shape[2:]]
      x = attention(functional.unfold(x, **split).transpose(1, 2)).transpose(1, 2).unflatten(2, grid)
    return self.project(functional.unfold(x, **SPLITS[2]).transpose(1, 2))


def position_table(num_positions, dim):
  """Interleaved sines and cosines, (1, num_positions, dim), computed in float64."""
  angle = np.arange(num_positions)[:, None] / 10000 ** (np.arange(0, dim, 2) / dim)
  return torch.from_numpy(np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(1, num_positions, dim)).float()


class T2TViT(nn.Module):
  """Logits (B, num_classes) of images of exactly `image_size`; with `num_classes=0` the features, (B, D)."""

  def __init__(
    self, *, tokens_type, embed_dim, num_heads, mlp_ratio, depth=12, num_classes=1000, image_size=224, in_channels=3,
    token_dim=64, qkv_bias=False, qk_scale=None, dropout_rate=0.0, attention_dropout_rate=0.0,
    stochastic_depth_rate=0.0, performer_dropout_rate=0.1, block_type='standard', dense_stages=(), growth_rate=0,
  ):  # fmt: skip
    super().__init__()
    self.tokens_to_token = TokensToToken(tokens_type, in_channels, token_dim, embed_dim, performer_dropout_rate)
    self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
    side = image_size
    for split in SPLITS:
      side = split_size(side, **split)
    self.pos_embed = nn.Parameter(position_table(1 + side**2, embed_dim), requires_grad=False)
    self.dropout = nn.Dropout(dropout_rate)
    block = dict(
      num_heads=num_heads,
      mlp_ratio=mlp_ratio,
      qkv_bias=qkv_bias,
      qk_scale=qk_scale,
      dropout_rate=dropout_rate,
      attention_dropout_rate=attention_dropout_rate,
      block_type=block_type,
    )
    if block_type == 'dense':
      self.blocks, embed_dim = _dense_blocks(embed_dim, dense_stages, growth_rate, stochastic_depth_rate, block)
    else:
      rates = np.linspace(0, stochastic_depth_rate, depth)
      self.blocks = nn.ModuleList(Block(embed_dim, drop_path=rate, **block) for rate in rates)
    self.norm = nn.LayerNorm(embed_dim)
    self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
    self._initialise()

  def _initialise(self):
    nn.init.normal_(self.cls_token, std=0.02)
    for module in self.modules():
      if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
          nn.init.zeros_(module.bias)

  def forward_features(self, images):
    tokens = self.tokens_to_token(images)
    x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    x = self.dropout(x + self.pos_embed)
    for block in self.blocks:
      x = block(x)
    return self.norm(x)[:, 0]

  def forward(self, images):
    return self.head(self.forward_features(images))


def _dense_blocks(width, stages, growth_rate, stochastic_depth_rate, block):
  """Blocks and transitions in one list, and the last width. All blocks of a stage share a stochastic-depth rate."""
  rates = np.linspace(0, stochastic_depth_rate, DENSE_RATES)
  blocks = nn.ModuleList()
  for stage, depth in enumerate(stages):
    if stage:
      blocks.append(Transition(width))
      width //= 2
    for _ in range(depth):
      blocks.append(DenseBlock(growth_rate, width, drop_path=rates[stage], **block))
      width += growth_rate
  return blocks, width
