"""From an image file to RGB pixels: depth, transparency, orientation, and crops that decode only what they need."""

from collections.abc import Iterator
import contextlib
import enum
import io
import math
import struct
from typing import Any, NamedTuple
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

ORIENTATIONS = {'upright': True, 'ignored': False}  # whether images are turned as their EXIF data says
JPEG_END = b'\xff\xd9'
# px. Longer images need far more memory than their pixels, since Pillow keeps an address for each row.
MAX_SIDE = 2**20
# Of an image that is larger than most, but below the number of pixels that Pillow refuses.
warnings.simplefilter('ignore', Image.DecompressionBombWarning)

Box = tuple[int, int, int, int]  # left, top, right, bottom in px


class BadImage(ValueError):  # noqa: N818 (a condition of the data that is dealt with)
  """An image file that cannot be decoded."""


class Remark(enum.IntFlag):
  """Facts about an image file that its pixels in 8-bit RGB no longer show."""

  NONE = 0
  DEEP = 1  # its samples have more than 8 bits
  TRANSPARENT = 2
  NOT_UPRIGHT = 4  # it asks to be turned, and is not


class _Turn(NamedTuple):
  """How a stored image becomes upright, and where its pixels come from."""

  method: Image.Transpose
  swaps_sides: bool  # before the other two
  from_right: bool  # columns are counted from the right of the stored image
  from_bottom: bool

  def stored_box(self, box: Box, width: int, height: int) -> Box:
    """The box of the stored image, `width` x `height` px, that becomes `box` of the upright one."""
    left, top, right, bottom = box
    if self.swaps_sides:
      left, top, right, bottom = top, left, bottom, right
    if self.from_right:
      left, right = width - right, width - left
    if self.from_bottom:
      top, bottom = height - bottom, height - top
    return left, top, right, bottom


_EXIF_ORIENTATION = 0x0112
_TURNS = {  # by EXIF orientation; 1 is upright
  2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
  3: _Turn(Image.Transpose.ROTATE_180, False, True, True),
  4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
  5: _Turn(Image.Transpose.TRANSPOSE, True, False, False),
  6: _Turn(Image.Transpose.ROTATE_270, True, False, True),
  7: _Turn(Image.Transpose.TRANSVERSE, True, True, True),
  8: _Turn(Image.Transpose.ROTATE_90, True, True, False),
}
_TIFF_BITS, _TIFF_BLACK, _TIFF_WHITE = 258, 340, 341  # tags: BitsPerSample, SMinSampleValue, SMaxSampleValue
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0


@contextlib.contextmanager
def _pillow_errors() -> Iterator[None]:
  """Turns every error of Pillow's readers but a lack of memory into `BadImage`."""
  try:
    yield
  except (MemoryError, BadImage):
    raise
  except UnidentifiedImageError as error:
    raise BadImage('no image file') from error
  except Image.DecompressionBombError as error:
    raise BadImage(f'more pixels than {2 * (Image.MAX_IMAGE_PIXELS or 0):,}') from error
  except Exception as error:
    raise BadImage(f'{type(error).__name__}: {error}') from error


class EncodedImage:
  """An image file, of which only the part that a crop needs is decoded.

  Pixels are 8-bit RGB. Deeper samples are scaled: 16-bit integers keep their upper half; floating-point numbers and
  32-bit integers are scaled from the range that a TIFF file declares, and without one floating-point numbers from
  [0, 1]. What is transparent is shown on white. Grey, CMYK and palettes are converted as Pillow does it.

  Attributes:
    width: px, of the image as `decode` returns it.
    height: px.
    remarks: what the pixels will no longer show.

  Raises:
    BadImage: the file is empty or no image; other damage shows when it is decoded.
  """

  def __init__(self, encoded: bytes, *, upright: bool = False):
    """Reads the header.

    Args:
      encoded: the file's bytes.
      upright: turn the image as its EXIF data says. The published models were trained without. Pillow itself turns
        TIFF files.
    """
    with _pillow_errors():
      self._image = Image.open(io.BytesIO(encoded))
      if max(self._image.size) > MAX_SIDE:
        raise BadImage(f'{self._image.width:,} x {self._image.height:,} px, of at most {MAX_SIDE:,} on a side')
      if self._image.format == 'EPS':
        raise BadImage('a program in PostScript, which is not run')
      if self._image.format == 'PNG':
        self._image.load()  # EXIF data may come last
      turn = _turn(self._image)
      deep, transparent = _is_deep(self._image) or _has_16_bits(self._image, encoded), self._image.has_transparency_data
    self._encoded = encoded
    self._turn = turn if upright else None
    self._stored_size = self._image.size
    swaps = self._turn is not None and self._turn.swaps_sides
    self.width, self.height = self._stored_size[::-1] if swaps else self._stored_size
    self.remarks = (
      (Remark.DEEP if deep else Remark.NONE)
      | (Remark.TRANSPARENT if transparent else Remark.NONE)
      | (Remark.NOT_UPRIGHT if turn and not upright else Remark.NONE)
    )

  def decode(self) -> Image.Image:
    """Decodes the whole image to RGB.

    Raises:
      BadImage: the file is damaged or cut off, or the range of its samples is unknown.
    """
    return self.crop((0, 0, self.width, self.height))

  def crop(self, box: Box, *, fast: bool = False) -> Image.Image:
    """Cuts out the pixels of `decode().crop(box)`, without decoding rows below the box if the file allows it.

    Args:
      box: inside the image.
      fast: decode JPEG with simplejpeg, which overlooks some kinds of damage; CMYK may be off by one.

    Raises:
      BadImage: as `decode`.
    """
    if self._turn is None:
      return self._stored_crop(box, fast)
    return self._stored_crop(self._turn.stored_box(box, *self._stored_size), fast).transpose(self._turn.method)

  def _stored_crop(self, box: Box, fast: bool) -> Image.Image:
    encoded = _without_rows_below(box[3], self._encoded, *self._stored_size)
    if fast and encoded.endswith(JPEG_END) and (crop := _fast_crop(encoded, box)):
      return crop
    with _pillow_errors():
      image = self._image if encoded is self._encoded else Image.open(io.BytesIO(encoded))
      if Remark.DEEP in self.remarks:
        return _to_rgb(image).crop(box)  # all samples decide whether their range is known
      return _to_rgb(image if box == (0, 0, *image.size) else image.crop(box))


def _turn(image: Image.Image) -> _Turn | None:
  """The turn that an image asks for; None if it is upright, or if its EXIF data cannot be understood."""
  if image.format == 'TIFF':
    return None
  try:
    return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
  except Exception:  # EXIF is full of surprises, and none of them harms the pixels
    return None


def _is_deep(image: Image.Image) -> bool:
  return image.mode == 'F' or image.mode.startswith('I')


def _has_16_bits(image: Image.Image, encoded: bytes) -> bool:
  """Whether the samples of a PNG or TIFF file in color have 16 bits, of which Pillow keeps the upper 8."""
  if image.format == 'PNG':
    return encoded[24] == 16
  tags: Any = getattr(image, 'tag_v2', {})
  return int(np.max(tags.get(_TIFF_BITS, 8))) > 8


def _to_rgb(image: Image.Image) -> Image.Image:
  image.load()
  if _is_deep(image):
    image = _to_grey(image)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
  return image if image.mode == 'RGB' else image.convert('RGB')  # `convert` would copy an RGB image


def _to_grey(image: Image.Image) -> Image.Image:
  """Scales samples of more than 8 bits to 8.

  Raises:
    BadImage: their range is unknown.
  """
  samples, tags = np.asarray(image), getattr(image, 'tag_v2', {})
  if samples.dtype.kind != 'f' and (image.mode.startswith('I;16') or image.format in ('PNG', 'PPM')):
    grey = (samples >> int(np.max(tags.get(_TIFF_BITS, 16))) - 8).astype(np.uint8)  # mode I of these has 16 bits too
  else:
    black, white = _range(samples, tags)
    scaled = 255 * (samples.astype(np.float64) - black) / (white - black)
    grey = np.round(np.clip(scaled, 0, 255)).astype(np.uint8)
  if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits only
    grey = 255 - grey
  if isinstance(transparent := image.info.get('transparency'), int):
    grey = np.where(samples == transparent, np.uint8(255), grey)
  return Image.fromarray(grey)


def _range(samples: np.ndarray, tags: Any) -> tuple[float, float]:
  """The values of black and white: as a TIFF file declares them, else 0 and 1 for floating-point numbers between them.

  Raises:
    BadImage: they are unknown.
  """
  if not np.isfinite(samples).all():
    raise BadImage('its samples are not all finite')
  if _TIFF_BLACK in tags and _TIFF_WHITE in tags:
    black, white = (float(np.ravel(tags[tag])[0]) for tag in (_TIFF_BLACK, _TIFF_WHITE))
    if black < white:
      return black, white
  if samples.dtype.kind != 'f' or samples.min() < 0 or samples.max() > 1:
    kind = 'floating-point numbers' if samples.dtype.kind == 'f' else '32-bit integers'
    raise BadImage(
      f'its samples are {kind} from {samples.min():g} to {samples.max():g}, and nothing declares which are black and '
      'white: save it with 8 or 16 bits'
    )
  return 0.0, 1.0


def _fast_crop(encoded: bytes, box: Box) -> Image.Image | None:
  """Decodes with simplejpeg and crops; None if simplejpeg can't read the file."""
  import simplejpeg

  left, top, right, bottom = box
  try:
    pixels = simplejpeg.decode_jpeg(encoded, strict=False)  # strict, it would refuse the shortened height
  except ValueError:
    return None
  return Image.fromarray(pixels[top:bottom, left:right])


def _without_rows_below(bottom: int, encoded: bytes, width: int, height: int) -> bytes:
  """JPEG file with less height in its header, so that the decoder stops early; `encoded` itself for other files.

  Rows are stored from top to bottom in stripes of up to 16. One stripe more than needed is kept, since the decoder
  interpolates colour between rows: so the pixels above `bottom` stay the same.
  """
  rows = 16 * math.ceil(bottom / 16) + 16
  if rows >= height or not encoded.endswith(JPEG_END):  # only decoding everything shows that the end is missing
    return encoded
  return encoded.replace(_jpeg_frame(width, height), _jpeg_frame(width, rows), 1)


def _jpeg_frame(width: int, height: int) -> bytes:
  """The start of the frame header of a baseline JPEG file with three components."""
  return struct.pack('>HHBHHB', 0xFFC0, 17, 8, height, width, 3)
