"""Model families: how each is taken apart, and how its sequence becomes shorter."""
