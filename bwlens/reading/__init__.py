"""Vectors read in the vocabulary."""
