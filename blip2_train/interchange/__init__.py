"""Whole models in other projects' files: read, written, compared."""
