"""How does the kernel talk to the overlay?  Start at `session`, then `operations`, then `lane`."""
