"""What export_hf.py writes with, and checks."""
