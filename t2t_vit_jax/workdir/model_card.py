"""The README.md and config.json beside a run's weights, as Hugging Face's hub takes them."""

import copy
import json
import math
from pathlib import PurePath
import re
from typing import Any

import yaml

from t2t_vit_jax import __version__
from t2t_vit_jax.conversion.pretrained import is_name
from t2t_vit_jax.conversion.weight_format import Weights, sides
from t2t_vit_jax.errors import printable
from t2t_vit_jax.recipe.evaluation import Accuracy

KINDS = {'ema': 'moving average of the weights', 'raw': 'weights of the last step'}
HUB_DATASETS = {  # name in tfds -> name on Hugging Face's hub
  'imagenet2012': 'ILSVRC/imagenet-1k',
  'cifar10': 'uoft-cs/cifar10',
  'cifar100': 'uoft-cs/cifar100',
}
MAX_CLASSES_NAMED = 20
Config = dict[str, Any]  # of `configs/default.py`, as nested dicts


def model_card(
  weights: Weights,
  description: dict[str, Any],
  step: int,
  metrics: dict[str, Any] | None,
  best: tuple[int, dict[str, Any]] | None,
) -> str:
  """The card, Markdown after a YAML header (https://huggingface.co/docs/hub/model-cards).

  Args:
    weights: of `model.safetensors`.
    description: of the run, as `description.description` makes it. Folders are left out: a card is there to be shown.
    step: optimizer steps done.
    metrics: of these weights; None if they were not evaluated.
    best: step and metrics of the best checkpoint that is kept.
  """
  config = _without_folders(description['config'])
  name = weights.model or 't2t_vit'
  parts = [
    f'---\n{_yaml(_header(name, config, metrics))}---',
    f'# {name}',
    *_model(weights, config),
    '## Accuracy',
    *_accuracy(metrics, step, best),
    '## Data',
    *_data(weights, config, description),
    '## Recipe',
    *_recipe(config, description.get('train_images'), step),
    '## Config',
    f'```yaml\n{_yaml(config)}```',
    '## Versions',
    *_versions(description.get('provenance')),
  ]
  return '\n\n'.join(parts) + '\n'


def hub_config(weights: Weights) -> str:
  """The config.json of a repository: model and preparation of images under timm's names, classes under transformers'.

  It is for the hub and for readers. `load_pretrained` reads the header of the weight file, which has more.
  """
  data, arguments = weights.data, weights.arguments
  height, width = sides(arguments['image_size'])
  config: dict[str, Any] = {
    'architecture': weights.model or 't2t_vit',
    'num_classes': arguments['num_classes'],
    'num_features': weights.arrays['params/norm/scale'].size,
    'model_args': arguments,
    'pretrained_cfg': {
      'input_size': [weights.channels, height, width],
      'fixed_input_size': False,
      'interpolation': data['interpolation'],
      'crop_pct': data['crop_fraction'],
      'crop_mode': 'center',
      'mean': data['mean'],
      'std': data['std'],
      'num_classes': arguments['num_classes'],
      'classifier': 'head',
    },
  }
  if weights.class_names:
    config['label_names'] = weights.class_names
    config['id2label'] = dict(enumerate(weights.class_names))
    config['label2id'] = {name: label for label, name in enumerate(weights.class_names)}
  return json.dumps(config, indent=2) + '\n'


def _without_folders(config: Config) -> Config:
  """A copy in plain YAML types, with names in place of paths."""
  config = _plain(copy.deepcopy(config))
  for group, field in ((config, 'init_from'), (config['data'], 'data_dir'), (config['data'], 'path')):
    if group.get(field) is not None and not is_name(group[field]):
      path = PurePath(group[field])
      # The files of all runs have the same names: the run's folder tells them apart.
      group[field] = '/'.join(path.parts[-3:] if path.parent.name == 'weights' else [path.name or '.'])
  return config


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, str):
    return printable(value)
  return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _yaml(value: Any) -> str:
  """YAML in which each value takes one line: none of them can end a block of the card."""
  return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True, width=math.inf)


def _name(text: str) -> str:
  """Any name as it is, and as code if Markdown could take it for more than a name."""
  return text if re.fullmatch(r"([^\W_]|(?<=[^\W_])_(?=[^\W_])|[ \[\]%:,.+'-])*", text) else _code(text)


def _code(text: str) -> str:
  """Any text as Markdown's inline code, within more backticks than it has in a row."""
  text = printable(text)
  fence = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
  return f'{fence} {text} {fence}' if '`' in text else f'{fence}{text}{fence}'


def _dataset(config: Config) -> tuple[str, str]:
  """The hub's type of the dataset, and a name for people."""
  data = config['data']
  if data['source'] not in ('tfds', 'digits'):
    return 'imagefolder', str(data['path'])  # the hub's word for data of one's own
  return HUB_DATASETS.get(data['name'], data['name']), data['name']


def _header(name: str, config: Config, metrics: dict[str, Any] | None) -> dict[str, Any]:
  hub_type, dataset = _dataset(config)
  header: dict[str, Any] = {
    'library_name': 't2t_vit_jax',
    'pipeline_tag': 'image-classification',
    'tags': ['t2t-vit', 'vision-transformer', 'image-classification', 'jax', 'flax'],
  }
  if hub_type != 'imagefolder':  # which is no dataset of the hub
    header['datasets'] = [hub_type]
  header['metrics'] = ['accuracy']
  if metrics:
    accuracy = Accuracy.from_dict(metrics)
    shares = [('top-1', accuracy.top1), ('top-5', accuracy.top5)]
    header['model-index'] = [
      {
        'name': name,
        'results': [
          {
            'task': {'type': 'image-classification', 'name': 'Image classification'},
            'dataset': {'type': hub_type, 'name': dataset, 'split': metrics['split']},
            'metrics': [
              {'type': 'accuracy', 'name': f'{label} of {accuracy.count} images', 'value': round(value, 6)}
              for label, value in shares
            ],
          }
        ],
      }
    ]
  return header


def _model(weights: Weights, config: Config) -> list[str]:
  trained = sum(array.size for path, array in weights.arrays.items() if path.startswith('params/'))
  size = weights.arguments['image_size']
  example = f"""```python
import t2t_vit_jax

model, variables = t2t_vit_jax.load_pretrained('model.safetensors')
logits = model.apply(variables, images)  # (B, {size}, {size}, {weights.channels}), normalised as below
```"""
  files = '`model.safetensors` holds the ' + KINDS[weights.source['weights']]
  if weights.source['weights'] == 'ema':
    files += f', `model_raw.safetensors` the {KINDS["raw"]}'
  start = f' Training began with the weights of {_code(config["init_from"])}.' if config['init_from'] else ''
  return [
    f'[T2T-ViT](https://arxiv.org/abs/2101.11986) in JAX and Flax: an image classifier with {trained:,} trained '
    f'parameters and {weights.arguments["num_classes"]} classes, for images of {size} x {size} px.{start}',
    f'{files}.',
    example,
    '```bash\nt2t-vit predict model.safetensors IMAGE\n```',
  ]


def _accuracy(metrics: dict[str, Any] | None, step: int, best: tuple[int, dict[str, Any]] | None) -> list[str]:
  if metrics is None:
    lines = ['These weights were not evaluated.']
  else:
    accuracies = {kind: Accuracy.from_dict(values) for kind, values in metrics.get('every', {}).items()}
    rows = [
      f'| {KINDS[kind]} | {each.top1:.2%} | {each.top5:.2%} | {each.loss:.4f} | {each.count} |'
      for kind, each in accuracies.items()
    ]
    lines = [f'{Accuracy.from_dict(metrics).last_line(_name(metrics["split"]))}, after step {step}, the last.']
    if rows:
      lines.append('\n'.join(['| weights | top-1 | top-5 | loss | images |', '|---|---|---|---|---|', *rows]))
    if unreadable := metrics.get('unreadable'):
      lines.append(f'{unreadable} of the images could not be read and count as wrong.')
  if best and best[0] != step:
    best_accuracy = Accuracy.from_dict(best[1]).last_line(_name(best[1]['split']))
    lines.append(
      f'The best evaluation of a kept checkpoint: {best_accuracy} after step {best[0]}. These are not its weights: '
      'choosing weights by the evaluated images would make their accuracy on these images too good.'
    )
  return lines


def _data(weights: Weights, config: Config, description: dict[str, Any]) -> list[str]:
  _, dataset = _dataset(config)
  source = config['data']['source']
  where = {'tfds': 'TensorFlow Datasets', 'folder': 'an image folder'}.get(source, f'source {_name(source)}')
  count = f', {description["train_images"]:,} images' if 'train_images' in description else ''
  share = f' ({_name(description["eval_part"])})' if description.get('eval_part') else ''
  data, size = weights.data, weights.data['image_size']
  names = weights.class_names or ()
  shown = ', '.join(map(_name, names[:MAX_CLASSES_NAMED]))
  more = f' and {len(names) - MAX_CLASSES_NAMED} more' if len(names) > MAX_CLASSES_NAMED else ''
  return [
    f'{_code(dataset)} ({where}): trained on {_code(config["data"]["train_split"])}{count}; evaluated on '
    f'{_code(config["data"]["eval_split"])}{share}.',
    f'Images are resized ({_name(data["interpolation"])}) so that the short side is '
    f'{math.floor(size / data["crop_fraction"])} px, cut to {size} x {size} in the middle, scaled to [0, 1] and '
    f'normalised with mean {_numbers(data["mean"])} and deviation {_numbers(data["std"])}.',
    *([f'Classes: {shown}{more}.'] if shown else []),
  ]


def _recipe(config: Config, train_images: int | None, step: int) -> list[str]:
  schedule, optimizer, augment = config['schedule'], config['optimizer'], config['augment']
  batch = config['data']['batch_size']
  rate = schedule['base_learning_rate'] * batch / schedule['base_batch_size']
  backbone = schedule['backbone_factor']
  rates = f'{rate:.3g}' if backbone == 1 else f'{rate:.3g} for the head and {backbone * rate:.3g} for the rest'
  epochs = '' if train_images is None else f' ({step * batch / train_images:.1f} epochs)'
  both = augment['mixup_alpha'] and augment['cutmix_alpha']  # then the probability decides; see `augment.Mixing`
  used = {
    'random resized crops': augment['crop'] == 'resized',
    'padded crops': augment['crop'] == 'padded',
    'flips': augment['horizontal_flip_probability'],
    'RandAugment': augment['randaugment_operations'],
    'mixup': augment['cutmix_probability'] < 1 if both else augment['mixup_alpha'],
    'cutmix': augment['cutmix_probability'] if both else augment['cutmix_alpha'],
    'random erasing': augment['random_erasing_probability'],
    'label smoothing': augment['label_smoothing'],
  }
  ema = f'; moving average with decay {config["ema"]["decay"]}' if config['ema']['decay'] else ''
  return [
    f'{step:,} steps of {batch} images{epochs}, {_name(optimizer["name"])}, weight decay '
    f'{optimizer["weight_decay"]:g}, peak learning rate {rates}, cosine schedule over {schedule["epochs"]} epochs with '
    f'{schedule["warmup_epochs"]} of warmup{ema}; computed in {_name(config["model"]["dtype"])}.',
    f'Augmentation: {", ".join(name for name, on in used.items() if on) or "none"}.',
  ]


def _versions(provenance: dict[str, Any] | None) -> list[str]:
  lines = [f'Written by t2t_vit_jax {__version__}.']
  if provenance is None:
    return lines
  commit = f', commit {_name(provenance["commit"])}' if provenance['commit'] else ''
  versions = _name(', '.join(f'{name} {version}' for name, version in provenance['versions'].items()))
  return [
    *lines,
    f'Trained on {_name(provenance["devices"])} with {versions}; code {_name(provenance["code"])}{commit}.',
  ]


def _numbers(values: Any) -> str:
  return ', '.join(f'{value:g}' for value in values)
