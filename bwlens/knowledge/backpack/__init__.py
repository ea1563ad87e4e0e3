"""The Backpack language model: the architecture, its senses read, and its senses changed."""
