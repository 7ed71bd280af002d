"""Datasets of tfds: what is said when data is missing or damaged. The digits stand for all."""

import shutil

import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.data.tfds_source import open_tfds


@pytest.fixture(scope='module')
def splits(data_dir):
  return {split: open_tfds('digits', split, data_dir) for split in ('train', 'test')}


@pytest.mark.parametrize('what', ['missing', 'a folder'])
def test_a_split_of_which_a_file_is_missing_is_refused_at_once(splits, data_dir, tmp_path, what):
  shutil.copytree(f'{data_dir}/digits', tmp_path / 'digits')
  (file,) = tmp_path.glob('digits/*/digits-test.array_record*')
  file.unlink()
  if what == 'a folder':
    file.mkdir()
  with pytest.raises(UserError, match=rf'1 of 1 files of digits are missing, such as {file}: copy .*prepare digits '):
    open_tfds('digits', 'test', str(tmp_path))
  assert len(open_tfds('digits', 'train', str(tmp_path))) == 1437


@pytest.mark.parametrize(
  'content', [b'', b'{', b'null', b'[' * 100_000, b'\xff\xfe', b'{"splits": 7}', b'{"splits": []}']
)
def test_damaged_metadata_of_a_dataset_get_one_line(splits, data_dir, tmp_path, content):
  shutil.copytree(f'{data_dir}/digits', tmp_path / 'digits')
  (file,) = tmp_path.glob('digits/*/dataset_info.json')
  file.write_bytes(content)
  with pytest.raises(UserError, match=r'^tfds cannot build .digits.: .') as error:
    open_tfds('digits', 'test', str(tmp_path))
  assert str(error.value).isprintable()


def test_a_split_without_shards_says_so(splits, data_dir, tmp_path):
  shutil.copytree(f'{data_dir}/digits', tmp_path / 'digits')
  (file,) = tmp_path.glob('digits/*/dataset_info.json')
  file.write_text(file.read_text().replace('"360"', ''))
  with pytest.raises(UserError, match=r"^split 'test' of digits cannot be read: "):
    open_tfds('digits', 'test', str(tmp_path))


def test_slices_of_a_split(data_dir):
  assert len(open_tfds('digits', 'test[:30]', data_dir)) == 30


@pytest.mark.parametrize(
  ('name', 'split', 'message'),
  [
    ('digit', 'train', "no dataset 'digit': did you mean 'digits'"),
    ('digits', 'tset', "no split 'tset': did you mean 'test'"),
    ('mnist/no_such_config', 'train', "cannot build 'mnist/no_such_config'"),
    ('imagenet2012', 'train', r'not prepared.* t2t-vit prepare imagenet2012 --manual-dir \S+ --d'),
    ('cifar10', 'train', r't2t-vit prepare cifar10 --data-dir'),
  ],
)
def test_missing_data_gets_one_line_that_helps(name, split, message, data_dir):
  with pytest.raises(UserError, match=message) as caught:
    open_tfds(name, split, data_dir)
  assert '\n' not in str(caught.value)
