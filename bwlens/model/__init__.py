"""The only room that knows TransformerLens' insides: loading, where weights are, passes, tokens."""
