"""A small language model of Python source, trained from nothing: examples/train_tiny_lm.py."""
