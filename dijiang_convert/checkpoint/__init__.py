"""Checkpoints on disk: shards, what lies beside them, the model card, and loading."""
