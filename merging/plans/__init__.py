"""What will be done: for each output tensor, from what and how. Computes nothing."""
