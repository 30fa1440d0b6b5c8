"""Distillation: what repairs a converted model. One objective a file, and the trainer that runs them."""
