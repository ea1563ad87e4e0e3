"""The paper's experiments, each a function from a model and edits to rows and a figure."""
