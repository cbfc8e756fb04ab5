"""Model families: the parts of each model, and the picture cell of each visual token."""
