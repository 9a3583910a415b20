"""Pictures of particles and of the tokens of real models. matplotlib is imported when one is drawn."""
