"""Multi-task self-supervised test-time defence (arXiv:2204.03714) and the attacks that judge it."""
