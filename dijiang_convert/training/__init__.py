"""One stage of a recipe after the other: objectives, the Trainer, what a run keeps and what it costs."""
