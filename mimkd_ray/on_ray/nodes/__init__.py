"""The cluster: joining it, what its nodes have and who holds it, where workers go, lost nodes."""
