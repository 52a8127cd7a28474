"""Tables, plots and pages of an evaluation and of a study."""
