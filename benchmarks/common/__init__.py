"""What the scripts share: timed processes, inputs with the shapes of real models, and the record of results."""
