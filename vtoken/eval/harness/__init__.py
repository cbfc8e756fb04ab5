"""vtoken in other evaluation harnesses: lmms-eval through an entry point, VLMEvalKit through a launcher."""
