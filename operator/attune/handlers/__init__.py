"""What kopf calls when something changes: each handler only wakes a key."""
