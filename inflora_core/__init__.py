"""InfLoRA: a classifier that never stops learning. Start reading at ``learner.py``."""
