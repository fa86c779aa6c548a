"""What any program has: files written whole or not at all, weights with a card, progress, HTML pages."""
