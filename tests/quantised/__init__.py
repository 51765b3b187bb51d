"""Quantised layers on the CPU platform: dequantisation, rounding of activations, interception."""
