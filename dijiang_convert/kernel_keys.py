"""Keys of a recipe's kernel, for those that import neither torch nor transformers."""

# They change nothing where there is no state.
OF_THE_STATE = (
    "signed", "frequency", "projection", "learned_features", "rotary", "decay", "selective", "decay_rank", "shift",
)  # fmt: skip
