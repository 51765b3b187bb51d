"""Operators of MiniMax-M2, usable without SGLang: one folder each, reference beside kernels."""
