"""What can be said of a draft model before it runs. No torch, no SGLang."""
