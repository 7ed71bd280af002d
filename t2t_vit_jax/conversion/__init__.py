"""Weight files: from PyTorch checkpoints of T2T-ViT to variables here, to one safe file format, and back."""

from t2t_vit_jax.conversion.convert import Options, convert, parse_image_size
from t2t_vit_jax.conversion.pretrained import find_weights, load_pretrained

__all__ = ['Options', 'convert', 'find_weights', 'load_pretrained', 'parse_image_size']
