"""A tiny Eagle3 draft for `tiny-m2`.

`model` is the draft and its published form, `data` what it learns from, `train` the run, `evaluate`
how many of its tokens the target accepts.
"""
