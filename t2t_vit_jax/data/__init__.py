import os

# Reaches buckets through gcsfs even where TensorFlow is installed. Must be set before tfds is imported.
os.environ.setdefault('EPATH_USE_TF', 'false')
