"""Labels of every kind: candidate labels, weak labels, and labels from eye fixations."""
