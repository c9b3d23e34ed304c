"""What is made of the core: counting, designing, pretraining, diagnosis, other people's models, benches. The core imports none of it."""
