"""Changes of a model's weights: apply, undo, save."""
