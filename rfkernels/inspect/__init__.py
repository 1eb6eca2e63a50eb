"""What the compiler makes of each kernel, seen without a GPU: `python -m rfkernels.inspect`."""
