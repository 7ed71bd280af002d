"""Preparing datasets: small tars in ImageNet's layout through the real builder, and everything that goes wrong."""

import hashlib
import json
import os
from pathlib import Path
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from unittest import mock

from array_record.python.array_record_data_source import ArrayRecordDataSource
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from t2t_vit_jax import UserError
from t2t_vit_jax.data import preparation
from t2t_vit_jax.data.preparation import _writing, convert, prepare
from t2t_vit_jax.data.tfds_source import open_tfds
from t2t_vit_jax.prepare import main
from tests.imagenet_tars import write_imagenet_tars
from tests.processes import start_command

VERSION = 'imagenet2012/5.1.0'


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
  """Folder of tars with 4 x 8 training and 10 validation images, and the images by name."""
  folder = tmp_path_factory.mktemp('tars')
  return folder, write_imagenet_tars(folder)


@pytest.fixture(scope='module')
def tfrecord(tars, tmp_path_factory):
  """data_dir with these images as tfrecord, three shards per split."""
  data_dir = tmp_path_factory.mktemp('tfrecord')
  builder = tfds.builder('imagenet2012', data_dir=data_dir, file_format='tfrecord')
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tars[0], num_shards=3))
  return data_dir


def digests(folder: Path) -> dict[str, str]:
  return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in folder.rglob('*') if path.is_file()}


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
  message = str(caught.value)
  assert '\n' not in message
  return message


def start(*arguments: object, setup: str) -> subprocess.Popen:
  """The program in a process of its own, after the statements `setup`."""
  code = f'{setup}; import sys; sys.argv[0] = "t2t-vit"; from t2t_vit_jax.__main__ import main; sys.exit(main())'
  return start_command(sys.executable, '-c', code, 'prepare', *arguments)


def test_tars_of_other_sizes_are_refused_before_anything_is_written(tars, tmp_path):
  with pytest.raises(UserError) as caught:
    prepare('imagenet2012', str(tmp_path / 'data'), str(tars[0]))
  size = (tars[0] / 'ILSVRC2012_img_train.tar').stat().st_size
  assert f'has {size:,} bytes, the official one 147,897,477,120' in one_line(caught)
  assert not (tmp_path / 'data').exists()


def test_the_right_tars_are_named(tmp_path):
  for name in ('ILSVRC2012_img_train_t3.tar', 'ILSVRC2012_img_val.tar'):
    (tmp_path / name).touch()
  with pytest.raises(UserError) as caught:
    prepare('imagenet2012', str(tmp_path / 'data'), str(tmp_path))
  message = one_line(caught)
  assert message.startswith(f'ILSVRC2012_img_train.tar not found in {tmp_path}, only ILSVRC2012_img_train_t3.tar')
  for manual_dir in (None, str(tmp_path / 'nowhere'), str(tmp_path / 'ILSVRC2012_img_val.tar')):
    with pytest.raises(UserError, match=r'the folder of ILSVRC2012_img_train\.tar and ILSVRC2012_img_val\.tar'):
      prepare('imagenet2012', str(tmp_path / 'data'), manual_dir)


@pytest.mark.parametrize('name', ['ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'])
def test_truncated_tars_are_refused_before_anything_is_written(name, tmp_path):
  write_imagenet_tars(tmp_path, images_per_class=3, num_validation=3)
  with tarfile.open(tmp_path / name) as tar:
    second = tar.getmembers()[1]
  for size in (second.offset_data + 100, second.offset):  # within a file in the tar, and between two
    os.truncate(tmp_path / name, size)
    with pytest.raises(UserError, match=f'{name} is truncated or damaged: ') as caught:
      prepare('imagenet2012', str(tmp_path / 'data'), str(tmp_path), allow_partial=True)
    one_line(caught)
  assert not (tmp_path / 'data').exists()


def test_validation_images_that_would_get_wrong_labels_are_refused(tmp_path):
  """The builder gives the n-th name in the tar the n-th label."""
  write_imagenet_tars(tmp_path, images_per_class=1, num_validation=3, first_validation=2)
  with pytest.raises(UserError, match='would get wrong labels'):
    prepare('imagenet2012', str(tmp_path / 'data'), str(tmp_path), allow_partial=True)


def test_too_small_disks_are_refused_before_anything_is_written(tmp_path):
  """A tar of 8 TB without 8 TB: zeros after its end, which take no space."""
  write_imagenet_tars(tmp_path, images_per_class=1, num_validation=1)
  os.truncate(tmp_path / 'ILSVRC2012_img_train.tar', 8 * 10**12)
  with pytest.raises(UserError, match=r'needs about 8080\.0 GB, and its disk has \d+\.\d \w+ free'):
    prepare('imagenet2012', str(tmp_path / 'data'), str(tmp_path), allow_partial=True)
  assert not (tmp_path / 'data').exists()


def test_gs_addresses_get_the_mount_command(tmp_path, monkeypatch):
  mount = r'`mkdir -p ~/bucket && gcsfuse --implicit-dirs bucket ~/bucket` and use ~/bucket'
  for call in (
    lambda: prepare('imagenet2012', 'gs://bucket/tfds'),
    lambda: prepare('imagenet2012', str(tmp_path), 'gs://bucket/tfds/'),
    lambda: convert('gs://bucket/tfds', str(tmp_path)),
    lambda: open_tfds('imagenet2012', 'train', 'gs://bucket/tfds'),
  ):
    with pytest.raises(UserError) as caught:
      call()
    assert one_line(caught).endswith(f'{mount}/tfds')
  monkeypatch.setenv('TFDS_DATA_DIR', 'gs://bucket')
  with pytest.raises(UserError) as caught:
    open_tfds('cifar10', 'train')
  assert one_line(caught).endswith(mount)


def test_missing_tensorflow_gets_one_line(tmp_path, monkeypatch, capfd):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  with pytest.raises(UserError, match=r"^this step needs tensorflow: pip .*\[prepare\]'$"):
    prepare('cifar10', str(tmp_path))
  assert capfd.readouterr() == ('', '')


def test_datasets_without_image_and_label_are_refused(tmp_path):
  with pytest.raises(UserError, match='imdb_reviews is no image-classification dataset'):
    prepare('imdb_reviews', str(tmp_path))


def test_prepared_datasets_are_kept_and_counted(tmp_path, capsys):
  assert main(['digits', '--data-dir', str(tmp_path)]) == 0
  before = digests(tmp_path)
  assert main(['digits', '--data-dir', str(tmp_path)]) == 0
  lines = capsys.readouterr().out.splitlines()
  folder = tmp_path / 'digits' / '1.0.0'
  assert lines[-2:] == [
    f'{folder} is there already and is kept',
    f'digits/1.0.0 is ready in {folder}: train 1,437, test 360 images',
  ]
  assert digests(tmp_path) == before


@pytest.mark.parametrize(
  ('name', 'size', 'message'),
  [
    ('digits-train.array_record-00000-of-00001', 100_000, 'is damaged, delete'),
    ('digits-test.array_record-00000-of-00001', None, 'is damaged, delete'),
    ('dataset_info.json', None, 'has no dataset_info.json'),
    ('dataset_info.json', 100, 'Failed to load JSON'),
  ],
)
def test_half_copied_datasets_are_not_called_ready(name, size, message, tmp_path, capsys):
  prepare('digits', str(tmp_path))
  damaged = tmp_path / 'digits' / '1.0.0' / name
  if size is None:
    damaged.unlink()
  else:
    os.truncate(damaged, size)
  capsys.readouterr()
  assert main(['digits', '--data-dir', str(tmp_path)]) == 2
  errors = capsys.readouterr().err
  assert message in errors
  assert errors.count('\n') == 1


def test_commands_without_a_task_are_refused(capsys):
  for arguments in ([], ['digits', '--convert', 'folder'], ['--convert', 'folder']):
    assert main(arguments) == 2
  assert '--convert needs --data-dir' in capsys.readouterr().err


def test_log_files_get_a_line_from_time_to_time(tmp_path, capsys):
  target = tmp_path / VERSION
  leftover, current = (target.parent / f'incomplete.{name}_5.1.0' for name in ('OLD000', 'NEW000'))
  leftover.mkdir(parents=True)
  (leftover / 'x').write_bytes(b'-')
  with _writing(target, seconds=0.02):
    current.mkdir()
    (current / 'imagenet2012-train.array_record-00000-of-00002').touch()
    os.truncate(current / 'imagenet2012-train.array_record-00000-of-00002', 2 * 10**9)
    time.sleep(1)
  note, *lines = capsys.readouterr().err.splitlines()
  assert note.endswith(f'unless another one is running: rm -r {leftover}')
  assert lines[-1] == f'{target}: 2.0 GB, 1 shard'


@pytest.mark.needs('tensorflow')
def test_partial_tars_become_records_of_the_same_bytes(tars, tmp_path, capsys):
  arguments = ['imagenet2012', '--data-dir', str(tmp_path), '--manual-dir', str(tars[0])]
  assert main([*arguments, '--allow-partial']) == 0
  assert capsys.readouterr().out.endswith(f'is ready in {tmp_path / VERSION}: train 32, validation 10 images\n')
  images = {}
  for split in ('train', 'validation'):
    source = open_tfds('imagenet2012', split, str(tmp_path))
    for record in source:
      name = record.id
      images[name] = record.image
      if split == 'train':
        assert source.class_names[record.label] == name.split('_')[0]
  assert images == tars[1]
  # What is there is a part, so the same command without --allow-partial must not call it ImageNet.
  assert main(arguments) == 2
  assert '32 train images, not 1,281,167' in capsys.readouterr().err


@pytest.mark.needs('tensorflow')
def test_folders_that_cannot_be_written_get_one_line(tars, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'cannot write .*Not a directory') as caught:
    prepare('imagenet2012', str(tmp_path / 'file' / 'data'), str(tars[0]), allow_partial=True)
  one_line(caught)


@pytest.mark.needs('tensorflow')
def test_training_on_tfrecord_names_the_command_that_converts(tars, tfrecord, tmp_path):
  import tensorflow as tf

  before = digests(tfrecord)
  with pytest.raises(UserError) as caught:
    open_tfds('imagenet2012', 'train', str(tfrecord))
  message = one_line(caught)
  with pytest.raises(UserError) as caught:
    prepare('imagenet2012', str(tfrecord), str(tars[0]))
  assert one_line(caught) == message
  command = shlex.split(message.split('with: ')[1].replace('NEW_FOLDER', str(tmp_path)))
  assert command[:2] == ['t2t-vit', 'prepare']
  assert main(command[2:]) == 0
  assert digests(tfrecord) == before
  # The records are those of the old files: same bytes, same order.
  for split, count in (('train', 32), ('validation', 10)):
    old, new = (sorted(map(str, folder.glob(f'{VERSION}/*{split}*-of-00003'))) for folder in (tfrecord, tmp_path))
    records = list(tf.data.TFRecordDataset(old).as_numpy_iterator())
    assert len(records) == count
    assert list(ArrayRecordDataSource(new)) == records
  source = open_tfds('imagenet2012', 'train', str(tmp_path))
  assert {record.id: record.image for record in source}.items() <= tars[1].items()
  assert source.class_names[:2] == ('n01440764', 'n01443537')
  # A second time: kept.
  before = digests(tmp_path)
  assert command[:2] == ['t2t-vit', 'prepare']
  assert main(command[2:]) == 0
  assert digests(tmp_path) == before


@pytest.mark.needs('tensorflow')
def test_conversions_that_make_no_sense_are_refused(tfrecord, tmp_path):
  prepare('digits', str(tmp_path))
  for folder, data_dir, message in (
    (tfrecord / VERSION, tfrecord, 'stays as it is: choose another --data-dir'),
    (tmp_path / 'digits' / '1.0.0', tmp_path / 'new', 'holds array_record files: only tfrecord can be converted'),
    (tfrecord, tmp_path / 'new', 'is no folder of a tfds dataset, such as DATA/imagenet2012/5.1.0'),
    (tmp_path / 'nowhere', tmp_path / 'new', 'is no folder of a tfds dataset'),
  ):
    with pytest.raises(UserError, match=message) as caught:
      convert(str(folder), str(data_dir))
    one_line(caught)
  assert not (tmp_path / 'new').exists()


def _flip_a_byte(shard: Path) -> None:
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)


@pytest.mark.needs('tensorflow')
@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (_flip_a_byte, 'is damaged'),
    (lambda shard: os.truncate(shard, shard.stat().st_size - 10), 'is damaged'),
    (lambda shard: shard.write_bytes(b''), 'holds 0 images, dataset_info.json says 4'),
    (Path.unlink, 'is missing, or no regular file'),
    (lambda shard: (shard.unlink(), os.mkfifo(shard)), 'is missing, or no regular file'),
  ],
)
def test_damaged_tfrecord_never_becomes_a_dataset(damage, message, tfrecord, tmp_path):
  shutil.copytree(tfrecord, tmp_path / 'old')
  (shard,) = tmp_path.glob(f'old/{VERSION}/*validation*-00001-of-00003')
  damage(shard)
  with pytest.raises(UserError, match=message) as caught:
    convert(str(tmp_path / 'old' / VERSION), str(tmp_path / 'new'))
  assert 'validation.tfrecord-00001-of-00003' in one_line(caught)
  assert not list(tmp_path.glob('new/imagenet2012/*'))


@pytest.mark.needs('tensorflow')
@pytest.mark.slow
def test_stopped_runs_leave_nothing_that_looks_complete(tmp_path):
  write_imagenet_tars(tmp_path / 'tars', images_per_class=2000)
  arguments = ['imagenet2012', '--allow-partial', '--manual-dir', tmp_path / 'tars', '--data-dir', tmp_path]
  setup = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)'  # even under nohup
  for stop, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
    process = start(*arguments, setup=setup)
    while not list(tmp_path.glob('imagenet2012/incomplete.*')):
      assert process.poll() is None, process.communicate()
      time.sleep(0.01)
    process.send_signal(stop)
    _, errors = process.communicate()
    assert process.returncode == code
    with pytest.raises(UserError, match='imagenet2012 is not prepared'):
      open_tfds('imagenet2012', 'train', str(tmp_path))
    if stop == signal.SIGINT:
      assert errors.splitlines()[-1].startswith('interrupted')
      assert 'Traceback' not in errors
      assert not list(tmp_path.glob('imagenet2012/*'))
  (leftover,) = tmp_path.glob('imagenet2012/incomplete.*')
  process = start(*arguments, setup=setup)
  output, errors = process.communicate()
  assert process.returncode == 0, errors
  assert f'rm -r {leftover}' in errors
  assert output.endswith('train 8,000, validation 10 images\n')


@pytest.mark.needs('tensorflow')
@pytest.mark.slow
def test_a_disk_that_fills_up_gets_one_line(tars, tfrecord, tmp_path):
  """Files end at 64 KB: what a full disk looks like to the writers."""
  setup = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))'
  for arguments in (
    ['imagenet2012', '--allow-partial', '--manual-dir', tars[0]],
    ['--convert', tfrecord / VERSION],
  ):
    process = start(*arguments, '--data-dir', tmp_path, setup=setup)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert errors.splitlines()[-1].startswith(f'error: cannot write {tmp_path / VERSION}: ')
    assert 'Traceback' not in errors
    assert not list(tmp_path.glob('imagenet2012/*'))


@pytest.mark.needs('tensorflow')
def test_a_proxy_that_does_not_answer_is_given_up(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(preparation, 'PATIENCE_S', 0.2)
  with socket.create_server(('localhost', 0)) as proxy:
    monkeypatch.setenv('HTTPS_PROXY', f'http://localhost:{proxy.getsockname()[1]}')
    assert main(['cifar10', f'--data-dir={tmp_path}']) == 2
  *_, fetching, error = capfd.readouterr().err.splitlines()
  assert fetching.startswith('fetching https://www.cs.toronto.edu/')
  assert error.startswith(f'error: cannot write {tmp_path}/cifar10/')
  assert 'timed out' in error


@pytest.mark.needs('tensorflow')
def test_reassessed_labels_are_prepared_and_read(tars, tmp_path):
  """In the folder of the tars, real.json stands in for the download of that name."""
  folder = tmp_path / 'tars'
  folder.mkdir()
  shutil.copy(tars[0] / 'ILSVRC2012_img_val.tar', folder)
  labels = [[], [970, 795], [230, 231], [809], *([number] for number in range(6))]
  (folder / 'real.json').write_text(json.dumps(labels))
  builder = tfds.builder('imagenet2012_real', data_dir=tmp_path / 'data')
  (url,) = (url for url, info in builder.url_infos.items() if info.filename == 'real.json')
  with mock.patch.object(type(builder), 'url_infos', {url: checksums.compute_url_info(folder / 'real.json')}):
    prepare('imagenet2012_real', str(tmp_path / 'data'), str(folder))
  source = open_tfds('imagenet2012_real', 'validation', str(tmp_path / 'data'))
  found = {record.id: [label for label in record.label if label >= 0] for record in source}
  assert found == {f'ILSVRC2012_val_{number + 1:08d}.JPEG': each for number, each in enumerate(labels)}
  assert {record.id: record.image for record in source} == {name: tars[1][name] for name in found}
