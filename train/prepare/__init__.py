"""Before training: features of the target, answers of the target. `python -m train.prepare`."""
