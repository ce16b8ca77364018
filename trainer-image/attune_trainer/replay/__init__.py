"""Replaying labelled utterances to both arms of a rollout: what is sent, what is counted, what is exported."""
