"""Training a draft head on a frozen target: unrolled loss, DeepSpeed engine, checkpoints,
metrics."""
