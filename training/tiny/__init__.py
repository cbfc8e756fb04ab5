"""How the tiny models that ship with vtoken were trained; not part of the installed package."""
