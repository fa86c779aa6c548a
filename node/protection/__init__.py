"""What a site allows a researcher, what leaves it, and the record of both."""
