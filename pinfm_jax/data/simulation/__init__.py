"""The world, the steps and the sizes of the simulated feed."""
