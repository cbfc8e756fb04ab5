"""One file per model family, named as its `config.model_type`."""
