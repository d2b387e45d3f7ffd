"""What plot_training.py draws with."""
