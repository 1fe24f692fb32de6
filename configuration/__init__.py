"""What a model is: configurations and the table of named encoders."""
