"""Raw activity logs, their preparation, and the Grain pipelines that feed training."""
