"""The clinic: small training runs in which one thing is done wrong, and runs in which nothing is."""
