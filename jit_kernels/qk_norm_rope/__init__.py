"""QK RMSNorm over an attention-TP group, with an optional partial rotation."""
