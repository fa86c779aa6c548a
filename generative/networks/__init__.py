"""The factory's networks: generators, discriminators and the layers they are built of."""
