"""Run SGLang's real engine and compare what it computes with transformers."""
