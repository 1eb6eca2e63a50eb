"""Two calls of a borrowed GPU, under five minutes each: `bench/gpu.sh first` and `bench/gpu.sh second`."""
