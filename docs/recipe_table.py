"""Writes the generated part of docs/recipes.md: `python -m docs.recipe_table`.

Settings are read from the configs, results from the run cards in their docstrings.
"""

import importlib
from pathlib import Path
import re

import configs

PAGE = Path(__file__).parent / 'recipes.md'
START, END = '<!-- written by docs/recipe_table.py -->\n', '<!-- end of the written part -->\n'


def config_names() -> list[str]:
  """Names of the runs in configs/, numbers in their order."""
  names = [path.stem for path in Path(configs.__path__[0]).glob('[!_]*.py') if path.stem != 'default']
  return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)])


def results(card: str) -> tuple[str, str]:
  """Results that a run card gives, published and measured here, such as '81.5 % (paper)' and 'nothing'.

  Raises:
    AttributeError: the card does not say.
  """
  return re.search(r'\nPublished top-1: (.+)\. Measured here: (.+)\.\n', card).groups()


def recipe_table() -> str:
  """One row for each run."""
  rows = [
    '| config | data | px | published top-1 | measured here | optimizer | batch | peak rate | weight decay | epochs |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for name in config_names():
    module = importlib.import_module(f'configs.{name}')
    config, (published, measured) = module.get_config(), results(module.__doc__)
    rate = config.schedule.base_learning_rate * config.data.batch_size / config.schedule.base_batch_size
    factor = config.schedule.backbone_factor
    rates = f'{rate:g}' if factor == 1 else f'{rate:g} head, {factor * rate:g} rest'
    yours = name == 'finetune'  # where data and weights decide
    data, size = ('yours', "the weights'") if yours else (config.data.name, config.data.image_size)
    batch = f'{config.data.batch_size}, or less' if config.data.min_steps_per_epoch else config.data.batch_size
    epochs = config.schedule.epochs + config.schedule.cooldown_epochs
    rows.append(
      f'| [`{name}`](../configs/{name}.py) | {data} | {size} | {published} | {measured} '
      f'| {config.optimizer.name} | {batch} | {rates} | {config.optimizer.weight_decay:g} | {epochs} |'
    )
  return '\n'.join(rows) + '\n'


def render(page: str) -> str:
  """Returns the page with its generated part replaced.

  Raises:
    ValueError: the page lacks one of the two marks.
  """
  before, rest = page.split(START)
  _, after = rest.split(END)
  return f'{before}{START}\n{recipe_table()}\n{END}{after}'


if __name__ == '__main__':
  PAGE.write_text(render(PAGE.read_text()))
