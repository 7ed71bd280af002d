"""A disk of 4 MB, for tests of full and read-only disks."""

import contextlib
import os
import shutil
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, options=''):
  """Mounts it at `folder`; skips the test where that is not allowed."""
  mount = ['mount', '-t', 'tmpfs', '-o', f'size=4m{options}', 'tmpfs', folder]
  if os.geteuid() or subprocess.run(mount, check=False).returncode:
    pytest.skip('needs the right to mount a small disk')
  try:
    yield
  finally:
    subprocess.run(['umount', '-l', folder], check=True)


def fill(folder, free):
  """Leaves `free` bytes of the disk."""
  (folder / 'filler').write_bytes(bytes(shutil.disk_usage(folder).free - free))
