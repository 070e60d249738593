"""Small worlds for CPUs: tasks with checkable answers, and models that were trained until they are as a world says."""
