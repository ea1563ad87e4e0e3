"""How the demo model was made: its corpus, tokenizer, training, records and statistics."""
