"""What any program needs: files written atomically, tables, weights with a card, progress bars, seeds, HTML pages."""
