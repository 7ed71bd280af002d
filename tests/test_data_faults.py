"""Images, labels and workers that fail: named, counted, and nothing hangs."""

import dataclasses
import itertools
import multiprocessing
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax.data import loader, transforms
from t2t_vit_jax.data.decoding import BadImage
from t2t_vit_jax.data.faults import Faults
from t2t_vit_jax.data.sources import open_folder
from t2t_vit_jax.data.tfds_source import open_tfds
from t2t_vit_jax.errors import DataError
from tests.image_folder import decode, encoded, picture, write_image_folder
from tests.parameters import slow_but

CROP = transforms.Chain(transforms.RandomPaddedCrop(16, padding=2))
CENTER = transforms.ResizeCenterCrop(16, 1.0)
GREY, RED = (128, 128, 128), (255, 0, 0)


def exif_rotated():
  """Red left, grey right; the orientation tag asks for a quarter turn."""
  image = Image.new('RGB', (8, 4), RED)
  image.paste(GREY, (4, 0, 8, 4))
  exif = Image.Exif()
  exif[0x0112] = 6
  return encoded(image, 'PNG', exif=exif)


@pytest.mark.parametrize(
  ('file', 'color'),
  [
    (encoded(Image.new('L', (8, 4), 128), 'JPEG'), GREY),
    (encoded(Image.new('CMYK', (8, 4), (0, 255, 255, 0)), 'JPEG', quality=100), (254, 0, 0)),
    (encoded(Image.new('P', (8, 4), 1, ), 'GIF'), (1, 1, 1)),
    (encoded(Image.new('RGBA', (8, 4), (*RED, 0)), 'PNG'), (255, 255, 255)),
    (encoded(Image.new('RGBA', (8, 4), (*RED, 255)), 'PNG'), RED),
    (encoded(Image.new('LA', (8, 4), (0, 127)), 'PNG'), GREY),
    (encoded(Image.new('1', (8, 4), 1), 'PNG'), (255, 255, 255)),
    (encoded(Image.new('I;16', (8, 4), 128 << 8), 'PNG'), GREY),
    (encoded(Image.new('RGB', (8, 4), RED), 'WEBP', lossless=True), RED),
    (encoded(Image.new('RGB', (8, 4), RED), 'TIFF'), RED),
  ],
  ids=['grey', 'cmyk', 'palette', 'transparent', 'opaque', 'grey-alpha', 'bilevel', '16-bit', 'webp', 'tiff'],
)  # fmt: skip
def test_every_mode_becomes_rgb(file, color):
  image = decode(file)
  assert (image.mode, image.size) == ('RGB', (8, 4))
  np.testing.assert_allclose(np.asarray(image), np.broadcast_to(color, (4, 8, 3)), atol=1)


def test_orientation_tags_are_ignored():
  image = decode(exif_rotated())
  assert image.size == (8, 4)
  assert (image.getpixel((0, 0)), image.getpixel((7, 0))) == (RED, GREY)


JPEG = encoded(picture(np.random.default_rng(0)), 'JPEG')
PNG = encoded(picture(np.random.default_rng(0)), 'PNG')


@pytest.mark.parametrize(
  'file',
  [b'', b'\0', JPEG[:200], JPEG[: len(JPEG) // 2], PNG[: len(PNG) // 2], b'<html>404 Not Found</html>', b'GIF89a'],
  ids=['empty', 'zero', 'header-only', 'cut-jpeg', 'cut-png', 'web-page', 'cut-gif'],
)
def test_what_is_no_whole_image_is_bad(file):
  with pytest.raises(BadImage):
    decode(file)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), file=st.sampled_from([JPEG, PNG]))
def test_damaged_files_are_images_or_bad_but_nothing_else(data, file):
  damaged = bytearray(file)
  for _ in range(data.draw(st.integers(1, 5))):
    damaged[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
  try:
    image = decode(bytes(damaged))
  except BadImage:
    return
  assert image.mode == 'RGB'


@pytest.fixture
def source(tmp_path):
  """24 images in 3 classes: 8 each."""
  return open_folder(write_image_folder(tmp_path / 'data', ('a', 'b', 'c'), train=8), 'train')


def damage(source, *indices):
  for index in indices:
    (source.records.folder / source[index].id).write_bytes(b'')


def train_batches(source, workers=0, last_step=3):
  return loader.train_batches(
    source,
    CROP,
    loader.TrainOrder(len(source), 8, seed=0),
    loader.Share(8),
    loader.Workers(workers),
    first_step=0,
    last_step=last_step,
  )


def eval_batches(source, workers=0):
  return loader.eval_batches(source, CENTER, loader.Share(10), loader.Workers(workers))


def examples(batches):
  """Record index -> its image, label, mask and whether it was bad."""
  return {
    int(index): {name: batch[name][i] for name in batch} for batch in batches for i, index in enumerate(batch['index'])
  }


def test_a_bad_image_is_replaced_by_the_next_good_one(source):
  whole = examples(train_batches(source))
  damage(source, 7, 8, 23)
  damaged = examples(train_batches(source))
  assert list(damaged) == list(whole)  # the order of the others stays
  assert {index for index, example in damaged.items() if example['bad']} == {7, 8, 23}
  assert [damaged[index]['label'] for index in (7, 8, 23)] == [1, 1, 0]  # of records 9, 9 and 0
  for index in set(whole) - {7, 8, 23}:
    np.testing.assert_array_equal(damaged[index]['image'], whole[index]['image'])
  # Record 9 twice, with the draws of records 7 and 8.
  assert (damaged[7]['image'] != damaged[9]['image']).any()


@pytest.mark.slow
def test_replacements_do_not_depend_on_workers(source):
  damage(source, 7, 8, 23)
  for batch, expected in zip(train_batches(source, workers=2), train_batches(source), strict=True):
    for name, array in batch.items():
      np.testing.assert_array_equal(array, expected[name])


def test_bad_images_are_named_once_and_stop_the_run_when_too_many(source):
  damage(source, 3)
  (source.records.folder / source[5].id).unlink()
  folder, consequence, lines = source.records.folder, 'the next one takes its place', []
  faults = Faults(source, lines.append, consequence, max_bad_fraction=2 / 24)
  batches = list(faults.check(train_batches(source, last_step=6)))
  assert len(batches) == 6
  assert set(batches[0]) == {'image', 'label', 'mask'}
  assert faults.num_bad == 2
  assert sorted(lines) == [
    f"image 5 of {folder} cannot be read ([Errno 2] No such file or directory: '{folder}/a/5.JPEG'); {consequence}",
    f'image a/3.JPEG cannot be read (no image file); {consequence}',
  ]
  damage(source, 6)
  faults = Faults(source, lines.append, consequence, max_bad_fraction=2 / 24)
  with pytest.raises(DataError, match=r'3 of the 24 images .* cannot be read, more than data\.max_bad_fraction'):
    list(faults.check(train_batches(source)))


def test_one_image_of_a_small_folder_may_be_bad(source):
  damage(source, 3)
  assert len(list(Faults(source, print, '', max_bad_fraction=0.001).check(train_batches(source, last_step=4)))) == 4
  with pytest.raises(DataError, match='1 of the 24 images'):
    list(Faults(source, print, '', max_bad_fraction=0.0).check(train_batches(source, last_step=4)))


def test_a_source_without_any_readable_image_ends(source):
  damage(source, *range(24))
  with pytest.raises(DataError, match='100 images in a row cannot be read'):
    list(train_batches(source))


def test_a_bad_image_is_evaluated_as_wrong(source):
  damage(source, 3)
  lines = []
  batches = list(Faults(source, lines.append, 'it counts as wrong').check(eval_batches(source)))
  labels, mask = (np.concatenate([batch[name] for batch in batches]) for name in ('label', 'mask'))
  assert mask.sum() == 24
  assert labels[3] == loader.UNREADABLE
  assert (labels[:24] >= 0).sum() == 23
  (line,) = lines
  assert line.startswith('image a/3.JPEG cannot be read')
  assert line.endswith('it counts as wrong')


def test_a_label_outside_the_classes_stops_at_once(data_dir):
  source = open_tfds('digits', 'train', data_dir)
  source = dataclasses.replace(source, class_names=source.class_names[:9])
  with pytest.raises(DataError, match=r'digit_\d{4}\.png has label 9, but digits train .* has 9 classes'):
    list(Faults(source, print, '').check(train_batches(source)))


def test_a_damaged_array_record_is_bad(data_dir, tmp_path):
  whole = open_tfds('digits', 'test', data_dir)
  shutil.copytree(f'{data_dir}/digits', tmp_path / 'digits')
  (file,) = tmp_path.glob('digits/*/*test.array_record*')
  content = bytearray(file.read_bytes())
  position = content.index(whole[100].image)
  content[position + 20] ^= 255
  file.write_bytes(content)
  source = open_tfds('digits', 'test', str(tmp_path))
  with pytest.raises(BadImage, match='hash mismatch'):
    source[100]
  assert source[99] == whole[99]
  lines = []
  batches = Faults(source, lines.append, 'it counts as wrong').check(eval_batches(source))
  assert sum(int((batch['label'] == loader.UNREADABLE).sum()) for batch in batches) == 1
  assert len(lines) == 1


def endless_batches(source, workers):
  return train_batches(source, workers, last_step=500)


@pytest.mark.parametrize(
  ('batches', 'workers'), slow_but([(eval_batches, 1)], itertools.product((endless_batches, eval_batches), (1, 2)))
)
def test_a_killed_worker_ends_the_run(source, batches, workers):
  many = dataclasses.replace(
    source, records=list(itertools.islice(itertools.cycle(map(source.records.__getitem__, range(24))), 4000))
  )
  iterator = batches(many, workers)
  next(iterator)
  victim = multiprocessing.active_children()[0]
  os.kill(victim.pid, signal.SIGKILL)
  started = time.monotonic()
  with pytest.raises(DataError, match=r'a data worker died .*exit code -9'):
    list(iterator)
  assert time.monotonic() - started < 30
  assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_program_without_absl_flags_can_use_workers(tmp_path, source):
  program = tmp_path / 'program.py'
  program.write_text(
    f"""
from t2t_vit_jax.data import loader, sources, transforms

if __name__ == '__main__':
  source = sources.open_folder({str(source.records.folder.parent)!r}, 'train')
  transform = transforms.ResizeCenterCrop(16, 1.0)
  batches = loader.eval_batches(source, transform, loader.Share(8), loader.Workers(1))
  print(sum(len(batch['label']) for batch in batches))
"""
  )
  environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])}
  done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (0, '24\n'), done.stderr


def test_the_image_that_takes_a_bad_ones_place_is_not_remarked_on_in_its_name(source):
  """Every image has a transparency channel, and the bad one is gone when the remark is to name it."""
  for path in source.records.folder.rglob('*.JPEG'):
    path.write_bytes(encoded(Image.new('RGBA', (16, 16), (9, 9, 9, 99)), 'PNG'))
  bad = source[5].id
  (source.records.folder / bad).unlink()
  lines = []
  list(Faults(source, lines.append, 'gone', max_bad_fraction=0.5).check(train_batches(source, last_step=6)))
  (remark,) = (line for line in lines if 'transparency channel' in line)
  assert bad not in remark
