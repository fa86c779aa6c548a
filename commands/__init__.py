"""The commands of `fedfactory`, by who types them: they parse, call and print."""
