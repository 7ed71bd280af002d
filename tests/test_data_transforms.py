"""Host transforms against timm's pixels, Pillow's, and the published distributions."""

import io
import math
import sys
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.data import decoding, transforms
from tests.golden import DATA
from tests.image_folder import decode, encoded


def as_file(image):
  return decoding.EncodedImage(encoded(image, 'PNG'))


@pytest.mark.parametrize('name', ['wide', 'tall', 'square'])
@pytest.mark.parametrize('size', [32, 48])
def test_evaluation_crop_equals_timms_pixel_for_pixel(name, size):
  with np.load(DATA / 'timm_eval_transform.npz') as file:
    image, expected = Image.fromarray(file[name]), file[f'{name}_eval{size}']
  crop = transforms.ResizeCenterCrop(size, crop_fraction=0.9, interpolation='bicubic')(image)
  np.testing.assert_array_equal(np.asarray(crop), expected)


def test_an_evaluation_crop_of_other_proportions_keeps_the_middle_of_the_side_that_is_left_over():
  # A ramp from 0 to 239: as wide as 120 px of its height, of which the middle 60 stay.
  ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], (240, 120, 3))
  crop = np.asarray(
    transforms.ResizeCenterCrop((60, 120), crop_fraction=1.0, interpolation='bilinear')(Image.fromarray(ramp))
  )
  np.testing.assert_array_equal(crop, ramp[90:150])
  rows, columns = (
    np.asarray(transforms.ResizeCenterCrop(size, crop_fraction=0.5, interpolation='bilinear')(Image.fromarray(image)))
    for size, image in (((30, 60), ramp), ((60, 30), ramp.swapaxes(0, 1)))
  )
  assert rows.shape == (30, 60, 3)
  np.testing.assert_array_equal(columns, rows.swapaxes(0, 1))
  np.testing.assert_array_equal(rows[:, 0, 0], np.arange(105, 135))  # half of each side of 60 x 120


@pytest.mark.parametrize('orientation', range(9))  # 0 is no orientation: EXIF begins with 1
def test_photographs_are_turned_as_their_exif_says(orientation):
  pixels = np.zeros((16, 24, 3), np.uint8)
  pixels[:8, :8] = 255  # upper left
  image, exif = Image.fromarray(pixels), Image.Exif()
  exif[0x0112] = orientation
  turned = decode(encoded(image, 'PNG', exif=exif), upright=True)
  assert turned.size == ((16, 24) if orientation >= 5 else (24, 16))
  corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
  assert np.asarray(turned)[corners.get(orientation, (0, 0))].tolist() == [255, 255, 255]


def test_exif_that_is_damaged_changes_nothing():
  image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
  damaged = decode(encoded(image, 'PNG', exif=b'Exif\x00\x00MM\x00*\x00\x00\xff\xff'), upright=True)
  np.testing.assert_array_equal(np.asarray(damaged), np.asarray(image))


@pytest.mark.parametrize('size', [(60_000, 1), (1, 60_000)])
def test_very_long_images_cost_no_more_than_their_middle(size):
  """Resized as a whole they would have 14.9 million px of length."""
  rng = np.random.default_rng(0)
  values = np.roll(np.repeat(rng.integers(0, 256, (max(size) // 100, 3), np.uint8), 100, axis=0), 50, axis=0)
  image = Image.fromarray(values[None] if size[1] == 1 else values[:, None])
  tracemalloc.start()
  result = np.asarray(transforms.ResizeCenterCrop(224, 0.9)(image))
  assert tracemalloc.get_traced_memory()[1] < 1e6
  tracemalloc.stop()
  assert result.shape == (224, 224, 3)
  assert (result == values[max(size) // 2]).mean() > 0.99  # less than one pixel of the image


@pytest.mark.parametrize('size', [(300, 200), (200, 333), (997, 61)])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_the_middle_of_a_long_image_is_that_of_the_whole(size, interpolation, monkeypatch):
  pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
  image, transform = Image.fromarray(pixels).resize(size), transforms.ResizeCenterCrop(96, 0.9, interpolation)
  whole = np.asarray(transform(image), int)
  monkeypatch.setattr(transforms, 'MAX_RESIZED_PIXELS', 0)
  np.testing.assert_allclose(np.asarray(transform(image), int), whole, atol=1)


def test_random_resized_crop_has_the_published_distribution():
  crop = transforms.RandomResizedCrop(32)
  rng = np.random.default_rng(0)
  width, height, draws = 500, 375, 10_000
  boxes = np.array([crop.draw_box(width, height, rng) for _ in range(draws)])
  left, top, right, bottom = boxes.T
  assert left.min() >= 0
  assert top.min() >= 0
  assert right.max() <= width
  assert bottom.max() <= height
  areas = (right - left) * (bottom - top) / (width * height)
  ratios = np.log((right - left) / (bottom - top))
  assert areas.min() == pytest.approx(0.08, abs=0.002)
  assert np.abs(ratios).max() <= math.log(4 / 3) + 0.02
  # Boxes that don't fit are drawn again, so large areas are rarer; below 0.7 every ratio fits and areas are uniform.
  low = areas[areas < 0.7]
  assert np.mean(low < 0.39) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(low)))
  small = ratios[areas < 0.5]
  assert np.mean(small < 0) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(small)))


def test_random_resized_crop_falls_back_to_the_centre():
  # 10 x 1000: no box of 8 % of the area fits with a ratio above 3/4.
  box = transforms.RandomResizedCrop(32).draw_box(10, 1000, np.random.default_rng(0))
  assert box == (0, 493, 10, 506)


def test_random_padded_crop_shifts_by_up_to_the_padding_and_fills_with_black():
  image = Image.fromarray(np.arange(1, 4 * 4 * 3 + 1, dtype=np.uint8).reshape(4, 4, 3))
  file, crop = as_file(image), transforms.RandomPaddedCrop(4, padding=1)
  padded = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
  windows = {padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)}
  rng = np.random.default_rng(0)
  assert {np.asarray(crop(file, rng)).tobytes() for _ in range(200)} == windows


def test_flip_has_its_probability_and_mirrors():
  image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
  rng = np.random.default_rng(0)
  flipped = [np.asarray(transforms.RandomHorizontalFlip(0.3)(image, rng))[0, 0, 0] == 3 for _ in range(2_000)]
  assert np.mean(flipped) == pytest.approx(0.3, abs=0.04)


def test_the_same_generator_gives_the_same_image():
  file = as_file(Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)))
  chain = transforms.Chain(transforms.RandomResizedCrop(24), (transforms.RandomHorizontalFlip(0.5),))
  first, second, other = (np.asarray(chain(file, np.random.default_rng(seed))) for seed in (7, 7, 8))
  np.testing.assert_array_equal(first, second)
  assert (first != other).any()


def textured(mode='RGB', width=150, height=133):
  """Waves, finer from left to right, with noise: every stripe and every colour channel differs from the next."""
  y, x = np.mgrid[:height, :width]
  waves = np.sin(x * (x / 900 + 0.05) + y * np.array([0.11, 0.23, 0.37])[:, None, None]).transpose(1, 2, 0)
  noise = np.random.default_rng(0).normal(size=(height, width, 3))
  return Image.fromarray(np.clip(128 + 80 * waves + 12 * noise, 0, 255).astype(np.uint8)).convert(mode)


FILES = {
  **{f'jpeg-{s}': encoded(textured(), 'JPEG', quality=90, subsampling=s) for s in ('4:4:4', '4:2:2', '4:2:0')},
  'jpeg-restarts': encoded(textured(), 'JPEG', quality=90, restart_marker_rows=1),
  'jpeg-progressive': encoded(textured(), 'JPEG', quality=90, progressive=True),
  'jpeg-thumbnail': encoded(textured(), 'JPEG', quality=90, comment=encoded(textured(), 'JPEG')),
  'jpeg-grey': encoded(textured('L'), 'JPEG'),
  'jpeg-cmyk': encoded(textured('CMYK'), 'JPEG'),
  'jpeg-tiny': encoded(textured(width=3, height=2), 'JPEG'),
  'png': encoded(textured(), 'PNG'),
  'gif': encoded(textured('P'), 'GIF'),
}


@pytest.mark.parametrize('name', FILES)
def test_crops_of_encoded_images_are_those_of_the_decoded_image(name):
  whole = Image.open(io.BytesIO(FILES[name])).convert('RGB')
  assert decoding.EncodedImage(FILES[name]).width == whole.width
  rng = np.random.default_rng(0)
  for bottom in range(1, whole.height + 1):
    left, top = int(rng.integers(whole.width)), int(rng.integers(bottom))
    box = left, top, int(rng.integers(left, whole.width)) + 1, bottom
    expected = np.asarray(whole.crop(box), int)
    for fast in (False, True):
      crop = decoding.EncodedImage(FILES[name]).crop(box, fast=fast)
      assert crop.mode == 'RGB'
      tolerance = 1 if fast and name == 'jpeg-cmyk' else 0
      np.testing.assert_allclose(np.asarray(crop, int), expected, rtol=0, atol=tolerance, err_msg=f'{box} {fast}')


def test_rows_below_a_crop_are_not_decoded():
  rows = decoding._without_rows_below(40, FILES['jpeg-4:2:0'], 150, 133)
  assert Image.open(io.BytesIO(rows)).size == (150, 64)


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('share', [0.6, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_bad_whatever_the_crop(share, fast):
  file = FILES['jpeg-4:2:0'][: int(share * len(FILES['jpeg-4:2:0']))]
  with pytest.raises(decoding.BadImage, match='truncated'):
    decoding.EncodedImage(file).crop((0, 0, 16, 16), fast=fast)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(['jpeg-4:2:0', 'jpeg-progressive', 'png']), fast=st.booleans())
def test_crops_of_damaged_files_are_images_or_bad_but_nothing_else(data, name, fast):
  damaged = bytearray(FILES[name])
  for _ in range(data.draw(st.integers(1, 5))):
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
  try:
    file = decoding.EncodedImage(bytes(damaged))
    crop = file.crop((0, 0, file.width, max(1, file.height // 2)), fast=fast)
  except decoding.BadImage:
    return
  assert (crop.mode, crop.size) == ('RGB', (file.width, max(1, file.height // 2)))


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('box', [(0, 0, 150, 133), (9, 20, 140, 100), (70, 50, 90, 75)], ids=['all', 'part', 'small'])
def test_fast_resize_rounds_otherwise_than_pillow_and_nothing_else(interpolation, box):
  crop = textured().crop(box)
  expected = crop.resize((64, 64), transforms.INTERPOLATIONS[interpolation])
  difference = np.abs(
    np.asarray(transforms.fast_resize(crop, 64, interpolation), int) - np.asarray(expected, int)
  )  # of 255
  assert difference.mean() < 0.4
  assert difference.max() <= 2


def test_fast_crops_draw_the_same_boxes():
  file = decoding.EncodedImage(FILES['jpeg-4:2:0'])
  for seed in range(20):
    rng, fast_rng = np.random.default_rng(seed), np.random.default_rng(seed)
    exact = transforms.RandomResizedCrop(32)(file, rng)
    fast = transforms.RandomResizedCrop(32, fast=True)(file, fast_rng)
    assert np.abs(np.asarray(fast, int) - np.asarray(exact, int)).mean() < 1
    assert fast_rng.bit_generator.state == rng.bit_generator.state


@pytest.mark.parametrize('package', ['cykooz_resizer', 'simplejpeg'])
def test_fast_crops_say_what_to_install(monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)  # as if it weren't installed
  with pytest.raises(UserError, match=rf"^data\.fast_decode needs {package}: pip .*\[fast\]'$"):
    transforms.RandomResizedCrop(32, fast=True)
