"""The paper's study as a harness: many small runs, each evaluated under many sampler settings, ranked and drawn."""
