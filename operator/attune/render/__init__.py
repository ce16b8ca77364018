"""Pure builders of Kubernetes objects. Nothing here talks to a cluster."""
