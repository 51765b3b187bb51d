"""Quantised checkpoints without a GPU's kernels: dequantised where they are used.

SGLang's own configs, parameters and weight loaders run unchanged, so what is loaded here is laid
out as on a GPU until its kernels repack it. Only what follows is replaced: nothing is repacked, and
`apply` computes with `dequantise` and plain PyTorch, with the activations rounded as the kernels
round them (`activations`). `layouts` says which of both belongs to which of SGLang's schemes.
"""
