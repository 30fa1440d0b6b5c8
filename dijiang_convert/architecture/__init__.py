"""What a model's attention looks like, and which of its layers convert."""
