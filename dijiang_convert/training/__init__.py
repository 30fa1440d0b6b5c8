"""Training of converted models: the plan of a run, its cost, objectives, the Trainer, checkpoints and the log.

Text is read by `data`, and models are measured by `measure`.
"""
