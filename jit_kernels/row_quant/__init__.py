"""Rows quantised as a runner's kernels quantise them, so that they can travel in fewer bytes."""
