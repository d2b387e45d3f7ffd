"""What evaluate_model.py measures with."""
