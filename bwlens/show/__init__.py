"""Pictures of a lens: for a terminal, for a page. Takes results, never a model."""
