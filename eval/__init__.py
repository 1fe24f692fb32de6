"""How a model is judged: tasks, metrics, the controlled study and its report."""
