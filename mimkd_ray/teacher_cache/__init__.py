"""The teacher's features in storage: keys, codecs, manifests, writing, reading, maintenance."""
