"""What any program needs: files written atomically, weights with a card, progress bars, seeds, HTML pages."""
