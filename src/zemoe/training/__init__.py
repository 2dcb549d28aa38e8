"""`zemoe train`: language models with zero experts from text files."""
