"""The teacher's features at rest: keys, codecs, manifests, writing, reading, upkeep."""
