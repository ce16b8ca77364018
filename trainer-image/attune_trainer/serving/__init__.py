"""The HTTP service that a Canary's pods run: settings, audio decoding, batching, metrics, and the application."""
