"""A real one-node Kubernetes for development; a tool beside Attune that the operator never imports."""
