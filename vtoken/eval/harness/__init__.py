"""vtoken inside evaluation harnesses of others: lmms-eval by an entry point, VLMEvalKit by a launcher."""
