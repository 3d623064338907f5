"""What a training run is made of, as names, live tensors and tagged values: captured without a copy, restored as a plan."""
