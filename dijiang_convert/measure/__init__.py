"""What a model does, in figures: beside its original, by position, in time and memory."""
