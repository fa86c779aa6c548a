"""The record of what was asked of a site and what left it."""
