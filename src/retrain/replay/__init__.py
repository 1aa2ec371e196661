"""A run's stored rollouts under another algorithm, without a model or an engine; and under its own, where credit and
gradient must come back exactly."""
