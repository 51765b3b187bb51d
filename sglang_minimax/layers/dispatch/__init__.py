"""Dispatch and combine behind SGLang's `customized` backend: our paths to the experts."""
