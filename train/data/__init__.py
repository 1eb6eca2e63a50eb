"""From images and captions to batches: sources, precompute, shards, the plan of a run."""
