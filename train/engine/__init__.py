"""The training engine: the loop and what it is made of."""
