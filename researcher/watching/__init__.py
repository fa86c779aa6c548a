"""Watching a run: what is known of it, as a page that is served while it goes on, and as a file for the record."""
