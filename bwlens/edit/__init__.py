"""Editing facts: methods that compute a change of the weights, and the change itself."""

from bwlens.edit.weights import WeightChange as WeightChange
