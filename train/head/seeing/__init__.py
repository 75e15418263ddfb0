"""What a run shows of itself while it goes and when it is over. Decides nothing about training."""
