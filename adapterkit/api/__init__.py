"""The Python calls behind `import adapterkit`: paths and options in, plans and results out."""
