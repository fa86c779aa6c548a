"""What the administrator of a node allows a researcher to ask for, and whether a request is within it."""
