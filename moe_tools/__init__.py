"""What is made of the core; the core imports none of it."""
