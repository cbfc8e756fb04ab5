"""Protocols of evaluation harnesses: prompts for questions, and parsing of answers."""
