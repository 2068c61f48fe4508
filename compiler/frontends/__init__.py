"""Sources: each module turns one kind of model into captured programs."""
