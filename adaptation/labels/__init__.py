"""Labels of every kind: candidate labels, weak labels, fixations of the eye."""
