"""Loops over tensors in chunks: sums, dot products, selection. Results do not depend on chunks."""
