"""Code shared by the benchmarks: timed processes, inputs with the shapes of real models, and reports."""
