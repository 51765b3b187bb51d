"""`tiny-m2`: a small trained MiniMax-M2 checkpoint, and everything that makes it.

`problems` and `dialogues` are the synthetic task, `tokenizer` and `model` the shapes, `train` the
run, `evaluate` and `planted` what the result can do and which mistakes in serving it exposes.
"""
