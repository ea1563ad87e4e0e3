"""Long work in parts that survive being killed."""
