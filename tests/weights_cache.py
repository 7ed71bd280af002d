"""A cache folder in which published weights are, in place of a download."""

import hashlib


def put_into_cache(content, name, cache):
  """Puts the bytes of a weight file there as the published weights `name`."""
  cache.mkdir(exist_ok=True)
  file = cache / f'{name}.safetensors'
  file.write_bytes(content)
  (cache / f'{file.name}.sha256').write_text(f'{hashlib.sha256(content).hexdigest()}  {file.name}\n')
