"""Sequence models that are no transformers, one file each; see `legacy/language_model.py`."""
