"""How a sequence of visual tokens becomes shorter inside unmodified transformers."""
