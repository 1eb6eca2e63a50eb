"""What a finished run is worth: validation loss, critics' scores and distances, compositional prompts."""
