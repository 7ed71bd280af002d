"""From image files to 8-bit RGB, against Pillow's own turning and against the same pictures with 8 bits."""

import io
from pathlib import Path
import re
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin
import pytest

from t2t_vit_jax.data import loader, transforms
from t2t_vit_jax.data.decoding import MAX_SIDE, BadImage, EncodedImage, Remark
from t2t_vit_jax.data.faults import REMARKS, Faults, Remarks
from t2t_vit_jax.data.sources import IMAGE_SUFFIXES, open_images
from tests.image_folder import decode, encoded

rng = np.random.default_rng(0)
PIXELS = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((90, 60)))
GREY = PIXELS[..., 0]
IN_RGB = np.repeat(GREY[..., None], 3, axis=-1)


def with_orientation(orientation, file_format='JPEG', **options):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encoded(Image.fromarray(PIXELS), file_format, exif=exif, **options)


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_and_crops_are_upright_as_pillow_turns_them(orientation, file_format):
  file = with_orientation(orientation, file_format)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert('RGB')
  image = EncodedImage(file, upright=True)
  assert (image.width, image.height) == upright.size == ((60, 90) if orientation > 4 else (90, 60))
  np.testing.assert_array_equal(image.decode(), upright)
  for box in ((3, 5, 40, 20), (0, 0, 17, 58), (30, 40, 60, 60)):
    np.testing.assert_array_equal(EncodedImage(file, upright=True).crop(box), upright.crop(box))


def test_fast_crops_are_upright_too():
  pytest.importorskip('simplejpeg')
  file = with_orientation(8, subsampling=0, quality=95)
  image = EncodedImage(file, upright=True)
  box = (3, 5, 40, 70)
  np.testing.assert_allclose(
    np.asarray(image.crop(box, fast=True), int), np.asarray(decode(file, upright=True).crop(box), int), atol=2
  )


@pytest.mark.parametrize('orientation', range(2, 9))
def test_an_ignored_orientation_leaves_the_stored_pixels(orientation):
  image = EncodedImage(with_orientation(orientation, 'PNG'))
  np.testing.assert_array_equal(image.decode(), PIXELS)
  assert image.remarks == Remark.NOT_UPRIGHT
  assert EncodedImage(with_orientation(orientation, 'PNG'), upright=True).remarks == Remark.NONE


def png(samples, color_type):
  """A PNG file with 16 bits a sample, which Pillow can't write in color."""
  height, width, *_ = samples.shape
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in samples)
  chunks = ((b'IHDR', struct.pack('>IIBBBBB', width, height, 16, color_type, 0, 0, 0)), (b'IDAT', zlib.compress(rows)))
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    for name, data in (*chunks, (b'IEND', b''))
  )


def tiff(samples, **tags):
  info = TiffImagePlugin.ImageFileDirectory_v2()
  for number, value in tags.items():
    info[int(number[1:])] = value
    info.tagtype[int(number[1:])] = 12 if isinstance(value, float) else 3  # DOUBLE, SHORT
  return encoded(Image.fromarray(samples), 'TIFF', tiffinfo=info)


def big_endian_tiff():
  file = bytearray(b'MM\0*\0\0\0\x08')
  height, width = GREY.shape
  entries = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1)]
  entries += [(278, 3, height), (279, 4, 2 * GREY.size)]
  start = 8 + 2 + 12 * len(entries) + 4
  file += struct.pack('>H', len(entries))
  for tag, kind, value in entries:
    value = start if tag == 273 else value
    file += struct.pack('>HHI', tag, kind, 1) + (
      struct.pack('>HH', value, 0) if kind == 3 else struct.pack('>I', value)
    )
  return bytes(file + bytes(4) + (GREY.astype('>u2') * 257).tobytes())


DEEP = GREY.astype(np.uint16) * 257
ALPHA = np.full((*GREY.shape, 1), 65535, np.uint16)


DEEP_FILES = {
  'PNG': (png(DEEP, 0), IN_RGB),
  'PNG, color': (png(PIXELS.astype(np.uint16) * 257, 2), PIXELS),
  'PNG, color and alpha': (png(np.concatenate([PIXELS.astype(np.uint16) * 257, ALPHA], -1), 6), PIXELS),
  'PNG, grey and alpha': (png(np.concatenate([DEEP[..., None], ALPHA], -1), 4), IN_RGB),
  'TIFF': (tiff(DEEP), IN_RGB),
  'TIFF, big-endian': (big_endian_tiff(), IN_RGB),
  'TIFF, white is zero': (tiff(65535 - DEEP, _262=0), IN_RGB),
  'PFM': (b'Pf\n90 60\n-1.0\n' + (GREY[::-1] / 255).astype('<f4').tobytes(), IN_RGB),
  'PGM': (b'P5 90 60 65535\n' + DEEP.astype('>u2').tobytes(), IN_RGB),
  'PGM of 12 bits': (b'P5 90 60 4095\n' + (np.round(GREY / 255 * 4095)).astype('>u2').tobytes(), IN_RGB),
  'TIFF, float': (tiff(GREY.astype(np.float32) / 255), IN_RGB),
  'TIFF, float with a range': (tiff(GREY.astype(np.float32) * 10 - 500, _340=-500.0, _341=2050.0), IN_RGB),
  'TIFF, 32-bit integers with a range': (tiff(GREY.astype(np.int32) * 1000, _340=0.0, _341=255000.0), IN_RGB),
  'bilevel': (encoded(Image.fromarray(GREY > 128), 'PNG'), 255 * (IN_RGB > 128)),
}


@pytest.mark.parametrize('name', DEEP_FILES)
def test_deep_samples_are_scaled(name):
  file, expected = DEEP_FILES[name]
  assert EncodedImage(file).remarks & Remark.DEEP == (Remark.NONE if name == 'bilevel' else Remark.DEEP)
  np.testing.assert_allclose(np.asarray(decode(file), int), expected, atol=1)
  box = (10, 20, 50, 40)
  np.testing.assert_array_equal(EncodedImage(file).crop(box), decode(file).crop(box))


@pytest.mark.parametrize(
  ('file', 'reason'),
  [
    (tiff(GREY.astype(np.float32)), r'floating-point numbers from \d+ to \d+, and nothing declares which are black'),
    (tiff(GREY.astype(np.int32) * 1000), '32-bit integers from'),
    (tiff(np.full((4, 4), np.nan, np.float32)), 'not all finite'),
  ],
)
def test_samples_of_unknown_range_are_refused(file, reason):
  with pytest.raises(BadImage, match=reason):
    decode(file)
  with pytest.raises(BadImage, match=reason):
    EncodedImage(file).crop((0, 0, 2, 2))  # though these samples alone might do


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_what_is_transparent_is_white(mode):
  image = Image.fromarray(np.dstack([PIXELS, np.where(GREY > 128, 255, 0).astype(np.uint8)])).convert('RGBA')
  options = {}
  if mode == 'LA':
    image = image.convert('LA')
  if mode == 'P':
    image, options = Image.fromarray((GREY > 128).astype(np.uint8)).convert('P'), {'transparency': 0}
  pixels = np.asarray(decode(encoded(image, 'PNG', **options)))
  assert (pixels[GREY <= 128] == 255).all()
  assert not (pixels[GREY > 128] == 255).all()
  assert EncodedImage(encoded(image, 'PNG', **options)).remarks == Remark.TRANSPARENT


def test_a_transparent_grey_of_16_bits_is_white():
  file, transparent = png(DEEP, 0), int(DEEP[0, 0])
  chunk = b'tRNS' + struct.pack('>H', transparent)
  start = file.index(b'IDAT') - 4
  file = file[:start] + struct.pack('>I', 2) + chunk + struct.pack('>I', zlib.crc32(chunk)) + file[start:]
  pixels = np.asarray(decode(file))
  clear = np.equal(DEEP, transparent)
  assert (pixels[clear] == 255).all()
  np.testing.assert_array_equal(pixels[~clear], IN_RGB[~clear])


def test_remarks_are_said_once(tmp_path):
  files = []
  for name, content in (('a.png', png(DEEP, 0)), ('b.png', png(DEEP, 0)), ('c.png', with_orientation(3, 'PNG'))):
    (tmp_path / name).write_bytes(content)
    files.append(str(tmp_path / name))
  source = open_images(files, upright=False)
  deep, turned = (
    f'image {file} {REMARKS[remark]}; others like it are not named'
    for file, remark in ((files[0], Remark.DEEP), (files[2], Remark.NOT_UPRIGHT))
  )
  # Runs and evaluations are configured to ignore the orientation; `predict` takes what belongs to the weights.
  for remarks, expected in ((None, [deep]), (Remarks(), [deep, turned])):
    lines, faults = [], Faults(source, lambda line: lines.append(line), '', remarks=remarks)  # noqa: B023
    for _ in range(2):
      transform = transforms.ResizeCenterCrop(8, 1.0)
      list(faults.check(loader.eval_batches(source, transform, loader.Share(2), loader.Workers())))
    assert lines == expected


COLOR = Image.fromarray(PIXELS)
FIRST, SECOND = Image.new('L', (4, 4), 10), Image.new('L', (4, 4), 200)
CLEAR = Image.new('RGBA', (4, 4), (9, 9, 9, 0))
# The rows of the table in docs/data.md: (file, whether to turn it, pixels; None if it is refused).
PICTURES = {
  'grey, bilevel, CMYK, palette': [
    (encoded(image, 'TIFF'), False, image.convert('RGB'))
    for image in (COLOR.convert('L'), COLOR.convert('1'), COLOR.convert('CMYK'), COLOR.quantize(8))
  ],
  '16 bits a sample': [(DEEP_FILES[name][0], False, IN_RGB) for name in ('PNG', 'TIFF', 'TIFF, white is zero', 'PGM')],
  'floating-point samples between 0 and 1': [(*DEEP_FILES['TIFF, float'][:1], False, IN_RGB)],
  'TIFF with SMinSampleValue and SMaxSampleValue, floating-point or 32-bit': [
    (DEEP_FILES[name][0], False, IN_RGB) for name in ('TIFF, float with a range', 'TIFF, 32-bit integers with a range')
  ],
  'other floating-point or 32-bit samples': [
    (tiff(GREY.astype(np.float32)), False, None),
    (tiff(GREY.astype(np.int32)), False, None),
  ],
  'transparent pixels': [(encoded(CLEAR, 'PNG'), False, np.full((4, 4, 3), 255))],
  'several frames or pages': [
    (encoded(FIRST, file_format, save_all=True, append_images=[SECOND]), False, FIRST.convert('RGB'))
    for file_format in ('GIF', 'TIFF', 'PNG')
  ],
  "colour profile, such as a phone's Display P3": [
    (encoded(COLOR, 'PNG', icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile('XYZ')).tobytes()), False, COLOR)
  ],
  "EXIF orientation, with `data.orientation='upright'`": [
    (with_orientation(6, file_format), True, COLOR.transpose(Image.Transpose.ROTATE_270))
    for file_format in ('PNG', 'TIFF')
  ],
  "EXIF orientation, with `data.orientation='ignored'`": [
    (with_orientation(6, 'PNG'), False, COLOR),
    (with_orientation(6, 'TIFF'), False, COLOR.transpose(Image.Transpose.ROTATE_270)),
  ],
}
PAGE = (Path(__file__).parents[1] / 'docs' / 'data.md').read_text()


def test_the_documented_table_is_complete():
  table = re.search(r'\| picture \|.*?\n\|---\|---\|\n(.*?)\n\n', PAGE, re.DOTALL)[1]
  assert [line.split(' | ')[0].removeprefix('| ') for line in table.splitlines()] == list(PICTURES)
  suffixes = re.search(r'these suffixes count: ((?:\.\w+\s)+)', PAGE)[1].split()
  assert suffixes == sorted(IMAGE_SUFFIXES)


@pytest.mark.parametrize('cases', PICTURES.values(), ids=PICTURES)
def test_pictures_are_read_as_documented(cases):
  for file, upright, pixels in cases:
    if pixels is None:
      with pytest.raises(BadImage):
        decode(file, upright=upright)
    else:
      np.testing.assert_allclose(np.asarray(decode(file, upright=upright), int), np.asarray(pixels, int), atol=1)


def png_header(width, height):
  """A PNG file of this size without its pixels."""
  chunks = (b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0), b'IDAT')
  framed = (struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk)) for chunk in chunks)
  return b'\x89PNG\r\n\x1a\n' + b''.join(framed)


@pytest.mark.parametrize(
  ('size', 'says'),
  [
    ((20_000, 20_000), 'more pixels than 178,956,970'),
    ((1, MAX_SIDE + 1), '1 x 1,048,577 px, of at most 1,048,576 on a side'),
    ((MAX_SIDE + 1, 1), '1,048,577 x 1 px, of at most 1,048,576 on a side'),
  ],
)
def test_images_beyond_the_bounds_are_refused_by_their_headers(size, says):
  with pytest.raises(BadImage, match=f'^{says}$'):
    EncodedImage(png_header(*size))


def test_the_longest_image_is_read():
  file = encoded(Image.new('L', (1, MAX_SIDE), 200), 'PNG')
  crop = transforms.ResizeCenterCrop(32, 0.9)(EncodedImage(file).decode())
  assert crop.getextrema() == ((200, 200),) * 3


def test_a_program_in_postscript_is_not_run():
  """Pillow would start Ghostscript."""
  program = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n'
  assert Image.open(io.BytesIO(program)).format == 'EPS'
  with pytest.raises(BadImage, match='a program in PostScript, which is not run'):
    EncodedImage(program)
