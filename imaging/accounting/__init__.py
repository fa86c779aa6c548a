"""What became of every entry of a folder: used, part of a case that was left out, passed over, or not read."""
