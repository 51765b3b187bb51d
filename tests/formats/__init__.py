"""Checkpoints of each quantisation format, small ones, and what the loader makes of them."""
