"""What a pretraining run needs before it is started: memory a device, work and traffic a step, an estimate of time."""
