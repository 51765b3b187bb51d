"""How tokens reach their experts and come back: which path, which bytes, and why.

No torch, no SGLang.
"""
