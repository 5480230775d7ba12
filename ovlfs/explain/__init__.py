"""The same lookup replayed for people: what layers say, what hides what, and why."""
