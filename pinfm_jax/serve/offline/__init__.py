"""What a bundle does without a server: recommendations, vectors, the demo."""
