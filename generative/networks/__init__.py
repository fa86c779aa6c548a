"""The factory's networks: generators, discriminators and the layers they consist of."""
