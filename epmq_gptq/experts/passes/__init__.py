"""An expert's own forward pass over its rows, one layer at a time."""
