"""Shards, order, samples and batches."""
