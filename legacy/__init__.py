"""Finished research, still runnable: the tournament, its field, and what it was measured with."""
