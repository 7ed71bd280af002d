"""Evaluation counts each image once: the same sums for every batch size and number of processes."""

import dataclasses
import json
from pathlib import Path
import sys

import numpy as np
from PIL import Image
import pytest

from configs import digits
from t2t_vit_jax.recipe.evaluation import Accuracy
from t2t_vit_jax.recipe.run import build_run
from tests import golden
from tests.image_folder import write_image_folder
from tests.processes import finish, free_port, start_command

ROOT = Path(__file__).parents[1]
CLASSES = tuple('abcdefgh')


def evaluate(overrides, processes):
  """Batch size -> sums, as each of the processes prints them."""
  port = free_port()
  command = [sys.executable, ROOT / 'tests' / 'evaluate.py', json.dumps(overrides)]
  running = [start_command(*command, i, processes, port, PYTHONPATH=str(ROOT)) for i in range(processes)]
  results = finish(running)
  assert [code for code, _, _ in results] == [0] * processes
  return [json.loads(output.splitlines()[-1]) for _, output, _ in results]


def sums_one_by_one(overrides, images):
  """Top-1, top-5 and loss sums by a plain loop over image files, with the model alone."""
  config = digits.get_config()
  config.update_from_flattened_dict(overrides)
  run = build_run(config)
  variables = run.recipe.fresh_state().variables()
  size, mean, std = config.data.image_size, np.array(config.data.mean), np.array(config.data.std)
  top1 = top5 = loss = 0
  for path, label in images:
    image = Image.open(path)
    scale = size / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    inputs = ((pixels / 255 - mean) / std).astype(np.float32)[None]
    logits = np.asarray(golden.apply(run.recipe.model, variables, inputs)[0], float)
    rank = int((logits > logits[label]).sum())
    top1, top5 = top1 + (rank < 1), top5 + (rank < 5)
    loss += np.log(np.exp(logits - logits[label]).sum())
  return top1, top5, loss


@pytest.mark.slow
def test_sums_do_not_depend_on_batches_and_processes(tmp_path):
  folder = write_image_folder(tmp_path / 'data', CLASSES, train=1, val=3)
  (folder / 'val' / 'c' / '1.JPEG').unlink()  # 23 images: no batch size divides them
  overrides = {
    'data.source': 'folder',
    'data.path': str(folder),
    'data.eval_split': 'validation',
    'data.batch_size': 8,
    'model.depth': 1,
    'ema.decay': 0.0,
  }
  images = [(path, label) for label, name in enumerate(CLASSES) for path in sorted((folder / 'val' / name).iterdir())]
  top1, top5, loss = sums_one_by_one(overrides, images)
  assert 0 < top1 < top5 < 23  # neither is trivial
  for processes in (1, 4):
    for results in evaluate(overrides, processes):
      for sums in results.values():
        assert (sums['count'], sums['correct'], sums['correct_top5'], sums['unreadable']) == (23, top1, top5, 0)
        assert sums['loss_sum'] == pytest.approx(loss, rel=1e-6)


def test_classes_are_listed_for_people_and_for_programs():
  names = ('cat', 'dog, big', 'emu\n', 'ü')
  accuracy = Accuracy(7, 9, 12, 1.0, class_correct=(4, 1, 0, 2), class_count=(4, 3, 0, 5), class_names=names)
  assert accuracy.class_table() == [
    'accuracy of each class, the worst first:',
    '  dog, big   33.33 % (1/3)',
    '  ü          40.00 % (2/5)',
    '  cat       100.00 % (4/4)',
    '  emu\\n     no image',
  ]
  assert accuracy.class_csv() == (
    'label,class,images,correct,top1\n0,cat,4,4,1.0000\n1,"dog, big",3,1,0.3333\n2,emu\\n,0,0,\n3,ü,5,2,0.4000\n'
  )
  assert 'class_count' not in accuracy.as_dict()
  many = dataclasses.replace(accuracy, class_names=names * 6, class_correct=(1,) * 24, class_count=(1,) * 24)
  assert many.class_table() == []
  assert Accuracy.from_dict(accuracy.as_dict()).class_table() == []
