"""Image folders: classes, labels, ids, and what is said about folders that are none."""

import hashlib
import os
from pathlib import Path
import re
import shutil
import socket
import sys

from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from configs import default
from t2t_vit_jax import UserError
from t2t_vit_jax.data.pipeline import open_sources
from t2t_vit_jax.data.sources import find_images, open_divided_folder, open_folder, open_images
from tests.image_folder import decode, write_image_folder
from tests.processes import start_command

CLASSES = ('n02', 'n10', 'n1')  # sorted as text: n02, n1, n10


@pytest.fixture
def folder(tmp_path):
  return write_image_folder(tmp_path / 'data', CLASSES, train=3, val=2)


def test_labels_number_the_folders_in_the_order_of_their_names(folder):
  source = open_folder(folder, 'train')
  assert source.class_names == ('n02', 'n1', 'n10')
  records = [source[i] for i in range(len(source))]
  assert [record.label for record in records] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  for record in records:
    assert record.id.split('/')[0] == source.class_names[record.label]
    assert record.image == (folder / 'train' / record.id).read_bytes()


def test_imagenets_synsets_have_the_labels_of_tfds():
  """There the synsets are numbered in the order of this list: it is the order of their names."""
  synsets = tfds.core.tfds_path('datasets/imagenet2012/labels.txt').read_text().split()
  assert len(synsets) == 1000
  assert synsets == sorted(synsets)


def test_classes_have_the_names_of_their_folders_whatever_the_locale_is(tmp_path):
  write_image_folder(tmp_path, ('Äpfel', '写真'), train=1)
  program = 'from t2t_vit_jax.data.sources import open_folder; print(ascii(open_folder(".", "train").class_names))'
  process = start_command(
    sys.executable,
    '-c',
    program,
    cwd=tmp_path,
    PYTHONPATH=str(Path(__file__).parents[1]),
    PYTHONUTF8='0',
    LC_ALL='C',
    PYTHONCOERCECLOCALE='0',
  )
  output, errors = process.communicate()
  assert output == f'{("Äpfel", "写真")!a}\n', errors


def test_the_validation_folder_goes_by_several_names(folder):
  assert len(open_folder(folder, 'validation')) == 6
  (folder / 'val').rename(folder / 'valid')
  assert len(open_folder(folder, 'validation')) == 6


def test_another_split_has_the_labels_of_the_training_split(folder):
  for path in (folder / 'val' / 'n02').iterdir():
    path.unlink()
  (folder / 'val' / 'n02').rmdir()
  train = open_folder(folder, 'train')
  validation = open_folder(folder, 'val', train.class_names)
  assert validation.class_names == train.class_names
  assert [validation[i].label for i in range(4)] == [1, 1, 2, 2]


def test_only_images_count_and_nested_and_linked_folders_do(folder):
  first = folder / 'train' / 'n02'
  (first / 'notes.txt').write_text('no image')
  (first / '._0.JPEG').write_text('a resource fork')
  (folder / 'train' / '.cache').mkdir()
  (first / 'deeper').mkdir()
  (first / '0.JPEG').rename(first / 'deeper' / 'Ünï côde.PnG')
  (first / 'linked').symlink_to(folder / 'val' / 'n1')
  source = open_folder(folder, 'train')
  assert source.class_names == ('n02', 'n1', 'n10')
  assert sorted(source[i].id for i in range(len(source)) if source[i].label == 0) == sorted(
    f'n02/{name}' for name in ('1.JPEG', '2.JPEG', 'deeper/Ünï côde.PnG', 'linked/0.JPEG', 'linked/1.JPEG')
  )


def test_the_order_does_not_depend_on_the_file_system(folder):
  names = [open_folder(folder, 'train')[i].id for i in range(9)]
  assert names == sorted(names)


def test_folders_that_are_no_dataset_get_one_line(folder, tmp_path):
  def message(path, split='train', **arguments):
    with pytest.raises(UserError) as caught:
      open_folder(path, split, **arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)

  assert message(tmp_path / 'nothing') == f'{tmp_path}/nothing does not exist'
  assert f'{folder} has no folder test' in message(folder, 'test')
  assert f'{tmp_path} has no folder validation or val or valid' in message(tmp_path, 'validation')
  assert 'classes that the training split lacks: n02' in message(folder, 'val', class_names=('n1', 'n10'))
  (folder / 'train' / 'empty').mkdir()
  assert f'{folder}/train/empty has no images' in message(folder)
  flat = tmp_path / 'flat'
  (flat / 'val').mkdir(parents=True)
  (flat / 'val' / 'ILSVRC2012_val_00000001.JPEG').write_bytes(b'')
  assert f'{flat}/val/CLASS/IMAGE, one folder for each class' in message(flat, 'validation')


def test_a_share_of_each_class_is_held_out_by_name_alone(tmp_path):
  folder = write_image_folder(tmp_path / 'data', ('a b', 'ü'), photos=10) / 'photos'
  (folder / 'single').mkdir()
  shutil.copy(folder / 'ü' / '0.JPEG', folder / 'single')
  train, held_out = open_divided_folder(folder, 'train', 'validation', 0.2)
  assert train.class_names == held_out.class_names == ('a b', 'single', 'ü')
  expected = [  # by SHA-256 of the name in its folder
    path
    for name in ('a b', 'ü')
    for path in sorted(
      (f'{name}/{i}.JPEG' for i in range(10)), key=lambda path: hashlib.sha256(path.encode()).hexdigest()
    )[:2]
  ]
  names = [held_out[i].id for i in range(len(held_out))]
  assert sorted(names) == sorted(expected)
  assert [held_out[i].label for i in range(len(held_out))] == [0, 0, 2, 2]
  assert len(train) == 17
  assert not {train[i].id for i in range(17)} & set(expected)
  # A folder `train` may be all there is.
  folder.rename(folder.parent / 'train')
  again = open_divided_folder(folder.parent, 'train', 'validation', 0.2)
  assert [again[1][i].id for i in range(4)] == names
  # Small and large shares leave an image on either side.
  for share, count in ((0.01, 1), (0.99, 9)):
    assert len(open_divided_folder(folder.parent, 'train', 'validation', share)[1]) == 2 * count


def test_nothing_is_held_out_where_there_is_a_folder_for_it(folder):
  assert open_divided_folder(folder, 'train', 'validation', 0.2) is None
  assert open_divided_folder(folder / 'nothing', 'train', 'validation', 0.2) is None


def test_splits_of_other_names_are_not_taken_for_classes(folder, tmp_path):
  (folder / 'train').rename(folder / 'training')
  with pytest.raises(UserError, match=r'/training has folders of images, but no image: .*train_split=FOLDER'):
    open_divided_folder(folder, 'train', 'test', 0.2)
  single = write_image_folder(tmp_path / 'single', ('cat', 'dog'), images=1)
  with pytest.raises(UserError, match=r'no class of .* has two images'):
    open_divided_folder(single / 'images', 'train', 'test', 0.2)


def test_a_million_names_are_one_array(folder):
  """Handed to every worker process: no Python object for each file."""
  records = open_folder(folder, 'train').records
  assert isinstance(records.names, np.ndarray)
  assert records.names.dtype.kind == 'S'


def test_images_below_folders_come_in_the_order_of_their_paths(folder, monkeypatch):
  monkeypatch.chdir(folder)
  (folder / 'val' / 'a.png').write_bytes(b'a')
  (folder / 'val' / 'notes').write_bytes(b'no name of an image')
  found = find_images(['val/notes', 'val', folder / 'val' / 'n1', 'val/a.png'])
  assert found[:2] == ['val/notes', 'val/a.png']  # a file is taken whatever its name is
  assert found[2:8] == [f'val/{name}/{i}.JPEG' for name in ('n02', 'n1', 'n10') for i in range(2)]
  assert found[8:] == [*(str(folder / 'val' / 'n1' / f'{i}.JPEG') for i in range(2)), 'val/a.png']
  source = open_images(found, upright=False)
  assert [source[i].id for i in range(len(source))] == found
  assert source[8].image == (folder / 'val' / 'n1' / '0.JPEG').read_bytes()


def test_paths_without_images_are_refused(folder):
  (folder / 'empty').mkdir()
  with pytest.raises(UserError, match=r'empty has no images \(\.avif, \.bmp, '):
    find_images([folder / 'val', folder / 'empty'])
  with pytest.raises(UserError, match=r'there is no file or folder .*typo'):
    find_images([folder / 'val', folder / 'typo'])


def test_a_folder_that_cannot_be_listed_is_an_error_not_left_out(folder, monkeypatch):
  real = os.scandir

  def scandir(path):
    if os.fspath(path).endswith('n10'):
      raise PermissionError(13, 'Permission denied', path)
    return real(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  for find in (lambda: find_images([folder]), lambda: open_folder(folder, 'train')):
    with pytest.raises(UserError, match='n10 cannot be read: Permission denied'):
      find()


def test_what_systems_and_programs_leave_is_no_data(folder):
  expected = {record.id for record in map(open_folder(folder, 'train').__getitem__, range(9))}
  for name in ('.ipynb_checkpoints', '@eaDir', '__MACOSX', '.thumbnails/large'):
    for place in ('train', 'train/n02', 'train/n02/deeper'):
      copy = folder / place / name
      copy.mkdir(parents=True)
      shutil.copy(folder / 'train' / 'n02' / '0.JPEG', copy / 'copy.JPEG')
  source = open_folder(folder, 'train')
  assert source.class_names == ('n02', 'n1', 'n10')
  assert {record.id for record in map(source.__getitem__, range(len(source)))} == expected
  assert source.notes == ()
  shutil.copytree(folder / 'train' / 'n02' / '@eaDir', folder / 'photos' / '@eaDir')
  shutil.copy(folder / 'train' / 'n02' / '0.JPEG', folder / 'photos' / 'a.jpg')
  assert find_images([folder / 'photos']) == [str(folder / 'photos' / 'a.jpg')]


def test_what_is_left_out_is_counted_by_suffix(folder):
  for name in ('a.mov', 'b.MOV', 'c.txt', 'Makefile'):
    (folder / 'train' / 'n02' / name).write_bytes(b'')
  (note,) = open_folder(folder, 'train').notes
  assert note == (f'{folder}/train: files that are no images by their names were left out: 2 .mov, 1 .txt, 1 no suffix')


@pytest.mark.parametrize('suffix', ['gif', 'avif', 'jfif', 'jpe', 'JP2'])
def test_every_format_that_pillow_reads_is_read(folder, suffix):
  image = Image.new('RGB', (16, 16), (250, 128, 3))
  path = folder / 'train' / 'n02' / f'more.{suffix}'
  image.save(path)
  source = open_folder(folder, 'train')
  (record,) = (record for record in map(source.__getitem__, range(10)) if record.id == f'n02/more.{suffix}')
  np.testing.assert_allclose(np.asarray(decode(record.image), int)[8, 8], (250, 128, 3), atol=12)


def test_links_that_lead_nowhere_are_named(folder):
  (folder / 'train' / 'n02' / 'gone.JPEG').symlink_to(folder / 'nothing.JPEG')
  (folder / 'train' / 'n02' / 'elsewhere').symlink_to(folder / 'nothing')
  (folder / 'train' / 'n02' / 'itself').symlink_to(folder / 'train' / 'n02' / 'itself')
  source = open_folder(folder, 'train')
  assert len(source) == 9
  (note,) = source.notes
  assert note.startswith(f'{folder}/train: 3 links lead nowhere, such as {folder}/train/n02/')


@pytest.mark.parametrize('target', ['train', 'train/n02', 'train/n1'])
def test_links_back_into_the_tree_are_refused(folder, target):
  (folder / 'train' / 'n02' / 'again').symlink_to(folder / target)
  with pytest.raises(UserError, match=r'is the same folder as .*, so its images would be read twice: remove the link'):
    open_folder(folder, 'train')


def test_copies_of_training_images_are_found(folder):
  shutil.copy(folder / 'train' / 'n02' / '1.JPEG', folder / 'val' / 'n10' / 'copy.JPEG')
  data = ConfigDict(
    dict(
      source='folder', path=str(folder), train_split='train', eval_split='val', eval_fraction=0.0, orientation='upright'
    )
  )
  train, evaluation = open_sources(data)
  assert train.upright
  assert evaluation.upright
  assert evaluation.notes == (
    '1 of the 7 evaluation images are copies of training images, so their accuracy will look too good: '
    f'{folder}/val/n10/copy.JPEG is {folder}/train/n02/1.JPEG',
  )
  (folder / 'val' / 'n10' / 'copy.JPEG').write_bytes(b'another image')
  assert open_sources(data)[1].notes == ()


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_split_that_cannot_be_read_gets_one_line(folder):
  (folder / 'train').chmod(0)
  try:
    with pytest.raises(UserError, match=r'train cannot be read: Permission denied'):
      open_folder(folder, 'train')
  finally:
    (folder / 'train').chmod(0o755)


def test_two_spellings_of_an_accent_are_one_class(tmp_path):
  """A Mac writes é as two characters."""
  write_image_folder(tmp_path, ('caf\u00e9', 'bar'), train=2)
  write_image_folder(tmp_path, ('cafe\u0301', 'bar'), val=1)
  train = open_folder(tmp_path, 'train')
  validation = open_folder(tmp_path, 'val', train.class_names)
  assert validation.class_names == train.class_names == ('bar', 'caf\u00e9')
  assert [validation[i].label for i in range(2)] == [0, 1]


def test_a_link_to_photographs_that_were_found_is_skipped(folder):
  (folder / 'train' / 'latest').symlink_to(folder / 'train' / 'n02')
  assert len(find_images([folder / 'train'])) == 9


@pytest.mark.parametrize('classes', [('car', 'train'), ('plane', 'val'), ('train', 'val')])
@pytest.mark.parametrize('eval_fraction', [0.0, 0.5])
def test_classes_whose_names_are_those_of_splits_have_a_way_out(classes, eval_fraction, tmp_path):
  """Following the advice of the message opens the folder."""
  write_image_folder(tmp_path, ('nested',), photos=4)
  for name in classes:
    shutil.copytree(tmp_path / 'photos' / 'nested', tmp_path / 'data' / name)
  config = default.get_config().data
  config.update(source='folder', path=str(tmp_path / 'data'), eval_fraction=eval_fraction)
  with pytest.raises(UserError, match='are its classes, add --config') as error:
    open_sources(config)
  for field, value in re.findall(r'--config\.data\.(\w+)=(\S+)', str(error.value)):
    config[field] = type(config[field])(value)
  train, evaluation = open_sources(config)
  assert train.class_names == evaluation.class_names == classes
  assert len(train) + len(evaluation) == 4 * len(classes)


@pytest.mark.parametrize('change', [{}, {'eval_fraction': 0.2}, {'train_split': '.'}])
def test_images_without_class_folders_get_advice_that_helps(change, tmp_path):
  """Flags for the config, as advised before, led to the same error again."""
  write_image_folder(tmp_path, ('cat',), photos=2)
  config = default.get_config().data
  config.update(source='folder', path=str(tmp_path / 'photos' / 'cat'), **change)
  with pytest.raises(UserError) as error:
    open_sources(config)
  assert '--config' not in str(error.value)
  for advised in re.findall(r'(\S+)/CLASS/IMAGE', str(error.value)):
    write_image_folder(Path(advised), ('a', 'b'), **{'.': 2})
  config.update(eval_fraction=0.2)
  assert open_sources(config)[0].class_names == ('a', 'b')


def test_pipes_and_devices_are_no_images(folder):
  """Reading them might never end."""
  os.mkfifo(folder / 'train' / 'n02' / 'pipe.jpg')
  (folder / 'train' / 'n02' / 'zero.png').symlink_to('/dev/zero')
  with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(str(folder / 'train' / 'n02' / 's.png'))
  (folder / 'train' / 'n02' / 'here').symlink_to('.')
  (folder / 'train' / 'n02' / 'again').symlink_to('.')
  notes: list[str] = []
  found = find_images([folder / 'train'], notes.append)
  assert found == [f'{folder}/train/{name}/{i}.JPEG' for name in ('n02', 'n1', 'n10') for i in range(3)]
  assert notes[0].startswith(f'{folder}/train: 3 are no regular files and left out, such as {folder}/train/n02/')
  with pytest.raises(UserError, match=r'n02/pipe\.jpg is no regular file'):
    find_images([folder / 'train' / 'n02' / 'pipe.jpg'])
  for link in ('here', 'again'):
    (folder / 'train' / 'n02' / link).unlink()
  source = open_folder(folder, 'train')
  assert len(source) == 9
  assert source.notes == tuple(notes)
