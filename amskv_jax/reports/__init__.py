"""Tables, plots and sheets for people."""
