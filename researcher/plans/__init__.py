"""The texts that travel to the nodes: what a site's administrator reads and approves."""
