"""Tables and plots of an evaluation."""
