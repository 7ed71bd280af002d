"""Peaks of devices, by JAX's names for them: Google's and NVIDIA's published figures."""

from t2t_vit_jax.planning.peaks import peak_flops


def test_peaks_of_known_devices():
  assert peak_flops('TPU v5 lite') == 197e12
  assert peak_flops('TPU v5') == peak_flops('TPU v5p') == 459e12
  assert peak_flops('TPU v6 lite') == 918e12
  assert peak_flops('NVIDIA A100-SXM4-80GB') == 312e12
  for unknown in ('cpu', 'NVIDIA RTX A1000 Laptop GPU', 'NVIDIA GB200', 'NVIDIA H200 NVL', 'TPU v4 lite', 'TPU v7'):
    assert peak_flops(unknown) is None
