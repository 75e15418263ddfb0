"""What a run leaves to be seen: its files, trackers, and the page made of them."""
