import os

# Buckets are reached through gcsfs, whether TensorFlow is installed or not. To be set before tfds is imported.
os.environ.setdefault('EPATH_USE_TF', 'false')
