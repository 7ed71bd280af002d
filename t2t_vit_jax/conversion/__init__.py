"""Weight files: from PyTorch checkpoints of T2T-ViT to variables here, to one safe file format, and back."""

from t2t_vit_jax.conversion.convert import Options, convert, load_pretrained, parse_image_size

__all__ = ['Options', 'convert', 'load_pretrained', 'parse_image_size']
