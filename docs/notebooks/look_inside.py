# %% [markdown]
# # Classify a photograph, and look inside
#
# This notebook classifies photographs with a T2T-ViT, and shows what is inside the model while it does: the features
# after each stage of the tokens-to-token module, and where the class token looks.
#
# It needs the extras `plots` and `probe`, and no network. So it trains a small model of its own, for 80 steps, on
# pieces of the two photographs that come with scikit-learn. With a network, these lines take the place of the training,
# and the sections after it work alike:
#
# ```python
# from t2t_vit_jax.data.class_names import readable_names
#
# model, variables = t2t_vit_jax.load_pretrained('t2t_vit_14')
# CLASSES = readable_names(None, 1000)
# ```
#
# A model made from two photographs knows these and nothing else. The pictures below show what there is to look at, not
# what a T2T-ViT trained on ImageNet sees.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_sample_image

import t2t_vit_jax
from t2t_vit_jax.models.layer_outputs import layer_outputs, layer_shapes
from t2t_vit_jax.visualize import principal_colors

# %config InlineBackend.figure_formats = ['jpeg']

# %% [markdown]
# ## Five classes from two photographs
#
# Each class is a rectangle of a photograph. Pieces of 64 x 64 px are cut from it at random: for training from its left
# two thirds, for the test from the rest, so that no test pixel was seen in training.

# %%
photographs = {name: load_sample_image(f'{name}.jpg') for name in ('flower', 'china')}  # 427 x 640 px each
SIDE = 64
# Class -> photograph, rows, columns.
RECTANGLES = {
  'petals': ('flower', (90, 350), (180, 440)),
  'leaves': ('flower', (0, 80), (0, 640)),
  'sky': ('china', (0, 130), (330, 640)),
  'temple': ('china', (70, 340), (90, 340)),
  'trees': ('china', (320, 427), (340, 560)),
}
CLASSES = list(RECTANGLES)
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def normalized(pixels):
  return (np.float32(pixels) / 255 - MEAN) / STD


def pieces(number, rng, test=False):
  """Normalised images (number, 64, 64, 3) and labels; half of them mirrored."""
  labels = rng.integers(len(CLASSES), size=number)
  images = []
  for label in labels:
    photograph, (top, bottom), (left, right) = RECTANGLES[CLASSES[label]]
    border = left + (right - left) * 2 // 3
    left, right = (border, right) if test else (left, border)
    y, x = rng.integers(top, bottom - SIDE + 1), rng.integers(left, right - SIDE + 1)
    piece = photographs[photograph][y : y + SIDE, x : x + SIDE]
    images.append(piece[:, ::-1] if rng.random() < 0.5 else piece)
  return normalized(images), labels


test_images, test_labels = pieces(200, np.random.default_rng(1), test=True)
figure, axes = plt.subplots(1, 10, figsize=(10, 1.4))
for axis, image, label in zip(axes, test_images, test_labels):
  axis.imshow(np.clip(image * STD + MEAN, 0, 1))
  axis.set_title(CLASSES[label], size=9)
  axis.axis('off')
plt.show()

# %% [markdown]
# ## A model, and a short training
#
# A model is a Flax module, and its weights are a tree of arrays. So training takes a loss, `jax.grad` and an optimizer
# of optax. Of the two collections of variables, `params` are trained; `frozen` is only passed along.

# %%
model = t2t_vit_jax.create_model('t2t_vit_tiny', num_classes=len(CLASSES), image_size=SIDE)
variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
params, frozen = variables['params'], variables['frozen']
optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, 80), weight_decay=0.05)
state = optimizer.init(params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, images, labels, key):
  def loss_of(params):
    logits = model.apply({'params': params, 'frozen': frozen}, images, train=True, rngs={'dropout': key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  loss, gradients = jax.value_and_grad(loss_of)(params)
  updates, state = optimizer.update(gradients, state, params)
  return optax.apply_updates(params, updates), state, loss


rng, losses = np.random.default_rng(0), []
for step in range(80):
  images, labels = pieces(32, rng)
  params, state, loss = train_step(params, state, images, labels, jax.random.key(step))
  losses.append(float(loss))
variables = {'params': params, 'frozen': frozen}

guesses = np.asarray(jax.jit(model.apply)(variables, test_images)).argmax(axis=1)
right = int((guesses == test_labels).sum())
print(f'test top-1 {100 * right / len(test_labels):.1f} % ({right}/{len(test_labels)})')

# %% [markdown]
# ## Classify whole photographs
#
# The model was made for 64 px, but images of any size go in: the position table is resized. These have 416 x 640 px,
# which is 26 x 40 tokens. (At 64 px it saw one thing at a time; in a whole photograph it finds several.)

# %%
wholes = {name: photograph[:416] for name, photograph in photographs.items()}
for name, photograph in wholes.items():
  logits = jax.jit(model.apply)(variables, normalized(photograph)[None])
  probabilities = np.asarray(jax.nn.softmax(logits[0]))
  best = probabilities.argsort()[::-1][:3]
  print(f'{name}:', ', '.join(f'{CLASSES[label]} {100 * probabilities[label]:.0f} %' for label in best))

# %% [markdown]
# ## What can be looked at
#
# Every layer's output has a name, which is its path in the parameters. `layer_shapes` lists them and computes nothing;
# `layer_outputs` returns those that you name, in one pass.

# %% tags=["exact"]
image = normalized(wholes['china'])[None]
for name, shape in layer_shapes(model, variables, image).items():
  if name.startswith(('tokens_to_token', 'blocks_3')):
    print(f'{name:40} {shape}')

# %% [markdown]
# ## Features after each stage
#
# The tokens-to-token module makes fewer and wider tokens, in three steps. Here are the first three principal components
# of the features as red, green and blue. Equal colours within a picture mean similar features; colours of different
# pictures cannot be compared.

# %%
STAGES = {
  'stage 1': 'tokens_to_token/attention1',
  'stage 2': 'tokens_to_token/attention2',
  'tokens': 'tokens_to_token',
  'last block': f'blocks_{model.depth - 1}',
}
figure, axes = plt.subplots(2, 5, figsize=(13, 4))
for row, photograph in zip(axes, wholes.values()):
  features, outputs = layer_outputs(model, variables, normalized(photograph)[None], list(STAGES.values()))
  pictures = {'photograph': photograph}
  for title, layer in STAGES.items():
    output = np.asarray(outputs[layer][0])
    if layer.startswith('blocks'):  # a row of tokens, the class token first
      output = output[1:].reshape(*features.tokens.shape[1:3], -1)
    pictures[f'{title}, {output.shape[0]} x {output.shape[1]}'] = principal_colors(output)
  for axis, (title, picture) in zip(row, pictures.items()):
    axis.imshow(picture)
    axis.set_title(title, size=9)
    axis.axis('off')
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Attention of the class token
#
# The class token collects what the head classifies. In each block it attends to all tokens; each row below is a block,
# each column a head. The attention of a head sums to 1 over all tokens; each map has a scale of its own.

# %%
blocks = [f'blocks_{number}' for number in range(model.depth)]
_, outputs = layer_outputs(model, variables, image, [f'{block}/attn/attention' for block in blocks])
figure, axes = plt.subplots(model.depth, model.num_heads, figsize=(11, 7))
for row, block in zip(axes, blocks):
  attention = np.asarray(outputs[f'{block}/attn/attention'][0])  # (heads, 1 + 26 * 40, 1 + 26 * 40)
  assert np.allclose(attention.sum(axis=-1), 1, atol=1e-4)
  to_tokens = attention[:, 0, 1:].reshape(-1, 26, 40)
  for head, (axis, shares) in enumerate(zip(row, to_tokens)):
    axis.imshow(wholes['china'].mean(axis=-1), cmap='gray')
    brightest = np.percentile(shares, 99)
    axis.imshow(shares, cmap='inferno', alpha=0.6, vmin=0, vmax=brightest, extent=(-0.5, 639.5, 415.5, -0.5))
    axis.set_title(f'{block}, head {head}', size=9)
    axis.axis('off')
plt.tight_layout()
plt.show()

# %% [markdown]
# ## From here
#
# - The same picture for any weights and any image, from the command line: [pictures](../predict.md#pictures).
# - All that `layer_outputs` does, and what it costs: [features and layers](../predict.md).
# - The modules in your own training code: [own code](../own_code.md).
# - Train on a folder of your own: [the other notebook](own_folder.ipynb).
