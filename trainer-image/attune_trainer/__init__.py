"""The training image: recipes that run as Jobs, and the server that answers with their models."""
