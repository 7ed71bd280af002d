"""Breaks the package on purpose, one fault at a time, and asks the tests whether they notice.

`python -m tests.deliberate_faults` runs the fast tests on each of `FAULTS`, `--all` all tests; numbers after it pick
some. Each fault is made in a copy of the checkout. It prints the test that caught it, or MISSED. The list was fixed
before the fast tests were chosen: change it only to follow the code.
"""

import argparse
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Fault(NamedTuple):
  """A change of one place of one file that makes the package wrong."""

  what: str
  file: str  # below t2t_vit_jax
  tests: str  # the file of tests that should notice, without test_ and .py; asked first
  old: str  # stands once in the file
  new: str


FAULTS = (
  Fault(
    'queries and keys of the token performer are swapped',
    'models/tokens_to_token.py',
    'models_t2t_vit',
    "k, q, v = self.projections(x, 'kqv', use_bias=True)",
    "q, k, v = self.projections(x, 'kqv', use_bias=True)",
  ),
  Fault(
    'the token transformer scales by the width of a token, not of a patch',
    'models/tokens_to_token.py',
    'models_t2t_vit',
    'scale = (self.split.kernel**2 * x.shape[-1]) ** -0.5',
    'scale = self.token_dim**-0.5',
  ),
  Fault("LayerNorm has Flax's epsilon", 'models/layers.py', 'models_layers', 'EPSILON = 1e-5', 'EPSILON = 1e-6'),
  Fault(
    "half LayerNorm's gradient has a wrong sign",
    'models/layers.py',
    'models_layers',
    'keepdims=True) - x_hat * along)',
    'keepdims=True) + x_hat * along)',
  ),
  Fault(
    'the squeeze takes the largest token, not the mean',
    'models/block_variants.py',
    'models_t2t_vit',
    'gate = x.mean(axis=1, keepdims=True)',
    'gate = x.max(axis=1, keepdims=True)',
  ),
  Fault(
    'blocks in a loop run in the reverse order',
    'models/blocks.py',
    'models_blocks',
    'jnp.stack(arrays), *(tree[name] for name in names)',
    'jnp.stack(arrays), *(tree[name] for name in reversed(names))',
  ),
  Fault(
    'an evaluation drops the last batch',
    'data/loader.py',
    'data_loader',
    'num_batches = math.ceil(len(source) / share.batch_size)',
    'num_batches = max(1, len(source) // share.batch_size)',
  ),
  Fault(
    'all processes read the same part of a batch',
    'data/loader.py',
    'data_loader',
    'step * self.batch_size + self.process_index * self.local_batch_size + offset',
    'step * self.batch_size + offset',
  ),
  Fault(
    'every epoch has the same order',
    'data/loader.py',
    'data_loader',
    'np.random.default_rng((seed, epoch, num_records))',
    'np.random.default_rng((seed, 0, num_records))',
  ),
  Fault(
    'RandAugment keeps eight bits where four are meant',
    'data/randaugment.py',
    'data_randaugment',
    'bits = 4 - int(4 * draw.level)',
    'bits = 8 - int(4 * draw.level)',
  ),
  Fault(
    'an unreadable image is evaluated as one of class 0',
    'data/loader.py',
    'data_faults',
    'return _example(self._black, self._labels(UNREADABLE), index, bad=True)',
    'return _example(self._black, self._labels(0), index, bad=True)',
  ),
  Fault(
    'raw weights are taken for the moving average',
    'conversion/checkpoint.py',
    'conversion',
    "{'ema': _first(saved, _EMA_KEYS), 'raw': _first(saved, _RAW_KEYS)}",
    "{'ema': _first(saved, _RAW_KEYS), 'raw': _first(saved, _EMA_KEYS)}",
  ),
  Fault(
    'convolutions are converted with height and width exchanged',
    'conversion/names.py',
    'conversion',
    "Transform('OIHW -> HWIO', (2, 3, 1, 0))",
    "Transform('OIHW -> HWIO', (3, 2, 1, 0))",
  ),
  Fault(
    'NaN in a weight file is let through',
    'conversion/weight_format.py',
    'conversion_safety',
    'elif not np.isfinite(array).all():',
    'elif array is None:',
  ),
  Fault(
    "CIFAR's mean and deviation are not noted",
    'conversion/convert.py',
    'conversion',
    '**(_CIFAR if checkpoint.cifar else {})',
    '**({} if checkpoint.cifar else {})',
  ),
  Fault(
    'the cls token decays', 'recipe/optimizer.py', 'recipe_optimizer', "UNDECAYED = ('cls_token',)", 'UNDECAYED = ()'
  ),
  Fault(
    'the cosine starts after the warmup',
    'recipe/optimizer.py',
    'recipe_optimizer',
    'jnp.cos(jnp.pi * epoch / cosine_epochs)',
    'jnp.cos(jnp.pi * (epoch - warmup_epochs) / cosine_epochs)',
  ),
  Fault(
    "a checkpoint has no optimizer's state",
    'workdir/checkpoints.py',
    'workdir_checkpoints',
    'saved = serialization.to_state_dict(state)\n',
    'saved = serialization.to_state_dict(state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state)))\n',
  ),
  Fault(
    'checksums of a checkpoint are not compared',
    'workdir/fingerprints.py',
    'workdir_checkpoints',
    'np.array_equal(saved[name], computed[name])',
    'saved[name].shape == computed[name].shape',
  ),
  Fault(
    'the moving average forgets at once',
    'recipe/steps.py',
    'recipe_steps',
    'state.ema, 1 - ema_decay)',
    'state.ema, ema_decay)',
  ),
  Fault(
    'every step draws the same dropout',
    'recipe/steps.py',
    'recipe_steps',
    'jax.random.split(jax.random.fold_in(rng, step))',
    'jax.random.split(rng)',
  ),
  Fault(
    'images are mixed, their targets are not',
    'recipe/augment.py',
    'recipe_augment',
    'y = y * share + y[:, ::-1] * (1 - share)',
    'y = y * share + y * (1 - share)',
  ),
  Fault(
    'an evaluation counts the padding',
    'recipe/evaluation.py',
    'recipe_evaluation',
    'length = min(len(self.source), len(labels))  # the rest is padding',
    'length = len(labels)',
  ),
  Fault(
    'metrics of steps that are done again stay',
    'workdir/metrics.py',
    'workdir_metrics',
    "if row and row['step'] <= (last if 'weights' in row else step)",
    'if row',
  ),
  Fault(
    "a loop's products count once",
    'planning/flops.py',
    'planning_flops',
    "params['length'] if name == 'scan' else 1",
    '1',
  ),
  Fault(
    'work and transfers do not overlap',
    'planning/compilation.py',
    'planning_compilation',
    'max(arithmetic_ms, bandwidth_ms)',
    'arithmetic_ms + bandwidth_ms',
  ),
  Fault(
    'predictions are logits, not probabilities',
    'predict.py',
    'predict',
    'jax.lax.top_k(jax.nn.softmax(logits), top)',
    'jax.lax.top_k(logits, top)',
  ),
  Fault(
    'an exported program does not normalise',
    'export.py',
    'export',
    'return model.apply(variables, normalize(images))',
    "return model.apply(variables, images.astype('float32') / 255)",
  ),
  Fault(
    "the picture shows another token's attention",
    'visualize.py',
    'visualize',
    'outputs[layer][:, :, 0, 1:] for block',
    'outputs[layer][:, :, 1, 1:] for block',
  ),
  Fault(
    'an unknown config field is let through',
    'config_files.py',
    'train',
    'if (path := match[1]) not in known and path not in config:',
    'if (path := match[1]) in known and path not in config:',
  ),
)


def copy_checkout(folder: Path) -> None:
  """Copies what git tracks, as it is in the working tree."""
  names = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
  for name in names:
    if (ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)


def first_failure(folder: Path, flags: list[str], tests: list[str]) -> str | None:
  """The first test that fails in `folder`, or that no test can start; None if all pass."""
  command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *flags, *tests]
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': f'{folder}-programs'}  # most are the same with each fault
  done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  if done.returncode in (0, 5):
    return None
  failed = re.search(r'^(?:FAILED|ERROR) (.+?)(?: - |$)', done.stdout, re.MULTILINE)
  return failed[1] if failed else f'pytest ends with {done.returncode}'


def caught_by(fault: Fault, folder: Path, flags: list[str]) -> str | None:
  """The test that fails with the fault, twice: `fault.tests` are asked first, then tests of the same room, then all."""
  file = folder / 't2t_vit_jax' / fault.file
  right = file.read_text()
  assert right.count(fault.old) == 1, fault
  file.write_text(right.replace(fault.old, fault.new))
  try:
    room = fault.file.split('/')[0].removesuffix('.py')
    nearest = sorted(path.relative_to(folder).as_posix() for path in (folder / 'tests').glob(f'test_{room}*.py'))
    for tests in filter(None, ([f'tests/test_{fault.tests}.py'], nearest, ['tests'])):
      found = first_failure(folder, flags, tests)
      if found and first_failure(folder, flags, [found]):
        return found
    return None
  finally:
    file.write_text(right)


def main() -> None:
  """Command line; exits with 1 if a fault is missed."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
  parser.add_argument('--all', action='store_true', help='run all tests, not the fast ones alone')
  parser.add_argument('numbers', nargs='*', type=int, help='of faults, from 1; all of them by default')
  arguments = parser.parse_args()
  flags = ['--all'] if arguments.all else []
  missed = 0
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name) / 'checkout'
    copy_checkout(folder)
    for number in arguments.numbers or range(1, len(FAULTS) + 1):
      fault = FAULTS[number - 1]
      found = caught_by(fault, folder, flags)
      missed += not found
      print(f'{number:2} {fault.file}: {fault.what}: {found or "MISSED"}', flush=True)
  print(f'{missed} missed')
  sys.exit(missed > 0)


if __name__ == '__main__':
  main()
