"""What became of every entry of a folder: used, left out with its case, passed over, or not read; unusual cases."""
