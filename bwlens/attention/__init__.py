"""Attention's half of a block: its reversed maps, scores of heads, and patching them in."""
