"""Records to edit and texts to measure on: reading and checking them."""
