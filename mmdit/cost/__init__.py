"""FLOPs, bytes and hardware: what a model costs to run."""
