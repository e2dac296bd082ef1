"""Model architectures: tensors in, named tensors out; no losses, no data, no other ranks."""
