"""Model families: where the parts of each are, and which of its visual tokens is which cell of the picture.
"""
