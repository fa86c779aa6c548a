"""Training plans whose source text is sent to the nodes, where the site's administrator reads and approves it."""
