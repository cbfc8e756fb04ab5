"""The `vtoken` command: every command and every screen."""
