"""The smaller copy of a dataset: sizes, classes, what cannot be read, and a run that goes on."""

from PIL import Image
import pytest
from sklearn.datasets import load_sample_image

from t2t_vit_jax import shrink
from t2t_vit_jax.data.sources import open_divided_folder, open_folder
from tests.image_folder import encoded

PHOTOS = ('china.jpg', 'flower.jpg')  # 640 x 427 px


@pytest.fixture
def photos(tmp_path):
  """An image folder of two photographs, a small picture, one on its side and one that is cut off."""
  for i, name in enumerate(PHOTOS):
    photo = Image.fromarray(load_sample_image(name))
    for split in ('train', 'val'):
      folder = tmp_path / 'photos' / split / f'class {i}'
      folder.mkdir(parents=True)
      photo.save(folder / 'photo.png')
  train = tmp_path / 'photos' / 'train' / 'class 0'
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  photo.save(train / 'side.jpg', exif=exif, quality=95)
  photo.resize((64, 43)).save(train / 'small.jpg')
  (train / 'cut.jpg').write_bytes(encoded(photo, 'JPEG')[:5000])
  return tmp_path / 'photos'


def sizes(folder):
  found = {}
  for path in sorted(folder.rglob('*.jpg')):
    with Image.open(path) as image:
      assert image.format == 'JPEG'
      found[str(path.relative_to(folder))] = image.size
  return found


def test_a_folder_of_photographs(photos, tmp_path, capsys):
  command = ['--folder', str(photos), '--output', str(tmp_path / 'small'), '--max-side', '320']
  assert shrink.main(command) == 0
  output = capsys.readouterr().out
  # In the order of their names: cut.jpg, photo.png, side.jpg, small.jpg, then the other class's.
  assert sizes(tmp_path / 'small' / 'train') == {
    'class 0/00000001.jpg': (320, 214),
    'class 0/00000002.jpg': (214, 320),
    'class 0/00000003.jpg': (64, 43),
    'class 1/00000004.jpg': (320, 214),
  }
  assert sizes(tmp_path / 'small' / 'validation').keys() == {'class 0/00000000.jpg', 'class 1/00000001.jpg'}
  small = tmp_path / 'small' / 'train' / 'class 0' / '00000003.jpg'
  assert small.read_bytes() == (photos / 'train' / 'class 0' / 'small.jpg').read_bytes()
  assert 'not copied: class 0/cut.jpg cannot be read' in output
  assert 'pixels differ: at 224 px an evaluation sees' in output
  copy = open_folder(tmp_path / 'small', 'train')
  assert (len(copy), copy.class_names) == (4, ('class 0', 'class 1'))

  # A second run takes what is there, and makes what is missing.
  kept, missing = small.with_name('00000001.jpg'), small.with_name('00000002.jpg')
  before = kept.stat().st_mtime_ns
  missing.unlink()
  assert shrink.main(command) == 0
  assert kept.stat().st_mtime_ns == before
  assert missing.exists()
  assert capsys.readouterr().out == output


def test_a_folder_of_classes_without_splits(photos, tmp_path, capsys):
  folder, small = str(photos / 'train'), str(tmp_path / 'small')
  assert shrink.main(['--folder', folder, '--output', small]) == 0
  assert capsys.readouterr().out.endswith(f'--config.data.path={small} --config.data.eval_fraction=0.2\n')
  train, evaluation = open_divided_folder(small, 'train', 'validation', 0.2)
  assert (len(train), len(evaluation), train.class_names) == (3, 1, ('class 0', 'class 1'))
  assert shrink.main(['--folder', folder, '--output', f'{folder}/small']) == 2
  assert 'would be one of the classes' in capsys.readouterr().err


def test_a_tfds_dataset(data_dir, tmp_path, capsys):
  assert shrink.main(['digits', '--data-dir', data_dir, '--output', str(tmp_path), '--max-side', '6']) == 0
  output = capsys.readouterr().out
  assert f'{tmp_path / "test"}: 360 images' in output
  train = open_folder(tmp_path, 'train')
  assert len(train) == 1437
  assert len(train.class_names) == 10
  assert {size for folder in sorted(tmp_path.iterdir()) for size in sizes(folder).values()} == {(6, 6)}


def test_a_split_that_cannot_be_opened_is_not_left_out(photos, tmp_path, capsys):
  (photos / 'val' / 'class 0' / 'photo.png').unlink()
  assert shrink.main(['--folder', str(photos), '--output', str(tmp_path / 'small')]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert 'class 0' in line


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--folder', 'nowhere', '--output', 'x'], 'nowhere does not exist'),
    (['--folder', '.', '--output', '.'], '. stays as it is'),
    (['imagenet2012', '--data-dir', 'nowhere', '--output', 'x'], 'imagenet2012 is not prepared'),
  ],
)
def test_mistakes_get_one_line(arguments, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert shrink.main(arguments) == 2
  errors = capsys.readouterr().err
  assert errors.startswith(f'error: {message}')
  assert errors.count('\n') == 1


def test_names_of_folders():
  assert [shrink.folder_name(name) for name in ('a b', 'hook/claw', '.x', '')] == ['a b', 'hook_claw', '_.x', '_']
