"""Training of the tiny models that ship with vtoken; not part of the installed package."""
