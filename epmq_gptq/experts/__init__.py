"""The experts: what one can be, its weights, and its own forward pass."""
