"""The rows that ship with the project, and the generator of its utility tasks."""
