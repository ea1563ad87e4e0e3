"""The lens of one prompt, as a user holds it."""
